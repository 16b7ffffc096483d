// The centroids as a tree of boxes, 16 children a node (the layout is described in tiles.h).
#pragma once
#include <vector>

#include "threads.h"
#include "tiles.h"

class CentroidTree {
 public:
  // centroids_KD in slot order; id[slot] is the caller's number (empty: the slot itself).
  void build(const float* centroids_KD, int K, int D, std::vector<int32_t> id = {});
  Tree tree{};

 private:
  std::vector<float> leaf_, low_[9], high_[9];
  std::vector<int32_t> id_;
};

// A spatial order of the centroids: repeatedly cut in two along the widest axis, at whole blocks of 16, 256, ...
// Returns the centroid of each slot.
std::vector<int32_t> spatial_order(const float* centroids_KD, int K, int D, const Workers&);
