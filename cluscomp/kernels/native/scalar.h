// K-means of numbers (D = 1), solved exactly.
#pragma once
#include <cstdint>
#include <vector>

#include "threads.h"

// values rising and distinct, mass > 0, K < values.size(). Returns the first value of each of the K groups that have
// the least sum of mass * (value - group mean)^2. Time K M log M, memory 4 K M bytes, for M values.
std::vector<int32_t> best_groups(const std::vector<double>& values, const std::vector<double>& mass, int K, const Workers&);

// The same for each of R rows of C numbers, which need be neither sorted nor distinct; mass >= 0 (a row without any
// counts its numbers alike). levels, R x K, are the groups' means, rising; what a row does not need repeats its last.
void best_levels(const float* values, const float* mass, int64_t R, int64_t C, int K, float* levels, const Workers&);
