// The first codebook: space is cut in two again and again until every piece has its one centroid.
#pragma once
#include <vector>

#include "threads.h"
#include "tiles.h"

// Leaves the points of `x` grouped by piece (`spare` is scratch of the same shape), writes each piece's mean to
// centroids_KD and returns the pieces, run.start being the piece's centroid. The seed moves each cut a little.
std::vector<Run> kd_split(const Columns& x, const Columns& spare, int K, float* centroids_KD, uint64_t seed, const Tiles&,
                          const Workers&);
