// K-means of numbers (D = 1), solved exactly.
#pragma once
#include <cstdint>
#include <vector>

#include "threads.h"

// values rising and distinct, mass > 0, K < values.size(). Returns the first value of each of the K groups that have
// the least sum of mass * (value - group mean)^2. Time K M log M, memory 4 K M bytes, for M values.
std::vector<int32_t> best_groups(const std::vector<double>& values, const std::vector<double>& mass, int K, const Workers&);
