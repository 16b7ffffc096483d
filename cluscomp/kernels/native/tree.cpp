#include "tree.h"

#include <algorithm>
#include <limits>
#include <numeric>

void CentroidTree::build(const float* centroids_KD, int K, int D, std::vector<int32_t> id) {
  const float inf = std::numeric_limits<float>::infinity();
  tree.K = K, tree.D = D, tree.top = 0;
  tree.count[0] = (K + 15) / 16;
  leaf_.assign(int64_t(tree.count[0]) * D * 16, inf);
  for (int k = 0; k < K; k++)
    for (int d = 0; d < D; d++) leaf_[int64_t(k / 16) * D * 16 + d * 16 + k % 16] = centroids_KD[int64_t(k) * D + d];
  while (tree.count[tree.top] > 1) {
    const int below = tree.top++, level = tree.top;
    tree.count[level] = (tree.count[below] + 15) / 16;
    low_[level].assign(int64_t(tree.count[level]) * D * 16, inf);
    high_[level].assign(int64_t(tree.count[level]) * D * 16, -inf);
    for (int node = 0; node < tree.count[below]; node++)
      for (int d = 0; d < D; d++) {
        const float* from_low = (below ? low_[below].data() : leaf_.data()) + (int64_t(node) * D + d) * 16;
        const float* from_high = (below ? high_[below].data() : leaf_.data()) + (int64_t(node) * D + d) * 16;
        float low = inf, high = -inf;
        for (int l = 0; l < 16; l++) {
          low = std::min(low, from_low[l]);
          if (from_high[l] < inf) high = std::max(high, from_high[l]);
        }
        const int64_t at = int64_t(node / 16) * D * 16 + d * 16 + node % 16;
        low_[level][at] = low, high_[level][at] = high;
      }
    tree.low[level] = low_[level].data(), tree.high[level] = high_[level].data();
  }
  tree.leaf = leaf_.data();
  id_ = std::move(id);
  if (id_.empty()) id_.resize(K), std::iota(id_.begin(), id_.end(), 0);
  tree.id = id_.data();
}

// Parts the centroids order[0 ... n - 1], more than 16 of them, in two; returns how many come first.
static int halve(const float* c, int D, int32_t* order, int n) {
  int unit = 16;
  while (int64_t(unit) * 16 < n) unit *= 16;
  int axis = 0;
  float widest = -1;
  for (int d = 0; d < D; d++) {
    float low = c[int64_t(order[0]) * D + d], high = low;
    for (int i = 1; i < n; i++) {
      const float v = c[int64_t(order[i]) * D + d];
      low = std::min(low, v), high = std::max(high, v);
    }
    if (high - low > widest) widest = high - low, axis = d;
  }
  const int units = (n + unit - 1) / unit, middle = units / 2 * unit;
  std::nth_element(order, order + middle, order + n, [&](int32_t a, int32_t b) {
    const float x = c[int64_t(a) * D + axis], y = c[int64_t(b) * D + axis];
    return x < y || (x == y && a < b);
  });
  return middle;
}

static void cut(const float* c, int D, int32_t* order, int n) {
  if (n <= 16) return;
  const int middle = halve(c, D, order, n);
  cut(c, D, order, middle);
  cut(c, D, order + middle, n - middle);
}

std::vector<int32_t> spatial_order(const float* centroids_KD, int K, int D, const Workers& workers) {
  struct Part { int begin, end; };
  std::vector<int32_t> order(K);
  std::iota(order.begin(), order.end(), 0);
  std::vector<Part> parts{{0, K}};
  while (workers.threads > 1 && parts.size() < 16 && K > 4096) {  // enough for all threads
    std::vector<Part> halves(2 * parts.size());
    workers.run(int64_t(parts.size()), [&](int64_t i, int) {
      const auto [begin, end] = parts[i];
      const int middle = end - begin <= 16 ? end : begin + halve(centroids_KD, D, order.data() + begin, end - begin);
      halves[2 * i] = {begin, middle}, halves[2 * i + 1] = {middle, end};
    });
    parts = std::move(halves);
  }
  workers.run(int64_t(parts.size()), [&](int64_t i, int) {
    cut(centroids_KD, D, order.data() + parts[i].begin, parts[i].end - parts[i].begin);
  });
  return order;
}
