// Groups are intervals of the sorted values. With error(i, j) of values i..j-1 as one group,
//   least[k][j] = min over i of least[k-1][i] + error(i, j)
// and the best i does not fall when j rises: so the middle j is solved first, and halves the choice for the others.
#include "scalar.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace {

struct Layer {
  const std::vector<double>&W, &S, &Q;  // running sums of mass, mass * value, mass * value^2
  const std::vector<double>& before;
  std::vector<double>& now;
  int32_t* cut;

  double error(int64_t i, int64_t j) const {
    const double w = W[j] - W[i], s = S[j] - S[i], e = Q[j] - Q[i] - s * s / w;
    return e > 0 ? e : 0;
  }
  void solve(int64_t j0, int64_t j1, int64_t i0, int64_t i1) {
    if (j0 > j1) return;
    const int64_t j = (j0 + j1) / 2;
    double least = std::numeric_limits<double>::infinity();
    int64_t best = i0;
    for (int64_t i = i0; i <= i1 && i < j; i++) {
      const double e = before[i] + error(i, j);
      if (e < least) least = e, best = i;
    }
    now[j] = least, cut[j] = int32_t(best);
    solve(j0, j - 1, i0, best);
    solve(j + 1, j1, best, i1);
  }
};

}  // namespace

std::vector<int32_t> best_groups(const std::vector<double>& values, const std::vector<double>& mass, int K, const Workers& workers) {
  const int64_t M = int64_t(values.size());
  std::vector<double> W(M + 1, 0), S(M + 1, 0), Q(M + 1, 0);
  double sum = 0, total = 0;
  for (int64_t i = 0; i < M; i++) sum += mass[i] * values[i], total += mass[i];
  for (int64_t i = 0; i < M; i++) {
    const double v = values[i] - sum / total;  // about the mean: less is lost in the differences
    W[i + 1] = W[i] + mass[i], S[i + 1] = S[i] + mass[i] * v, Q[i + 1] = Q[i] + mass[i] * v * v;
  }
  std::vector<double> before(M + 1), now(M + 1, 0);
  std::vector<int32_t> cuts(int64_t(K) * (M + 1), 0), groups(K);
  Layer one{W, S, Q, before, now, cuts.data()};
  for (int64_t j = 1; j <= M; j++) now[j] = one.error(0, j);
  const Workers alone{1, workers.stop_asked};
  alone.run(K - 1, [&](int64_t k, int) {  // one after the other; run() looks for Ctrl-C
    before.swap(now);
    Layer layer{W, S, Q, before, now, &cuts[(k + 1) * (M + 1)]};
    layer.solve(k + 2, M, k + 1, M - 1);
  });
  for (int64_t k = K - 1, j = M; k >= 0; k--) groups[k] = int32_t(j = cuts[k * (M + 1) + j]);
  return groups;
}

void best_levels(const float* values, const float* mass, int64_t R, int64_t C, int K, float* levels, const Workers& workers) {
  workers.run(R, [&](int64_t r, int) {
    std::vector<std::pair<float, double>> row(C);
    double total = 0;
    for (int64_t c = 0; c < C; c++) total += mass[r * C + c];
    for (int64_t c = 0; c < C; c++) row[c] = {values[r * C + c], total > 0 ? mass[r * C + c] : 1};
    std::sort(row.begin(), row.end());
    std::vector<double> value, weight;  // the distinct ones
    for (const auto& [v, m] : row) {
      if (m <= 0) continue;
      if (value.empty() || value.back() != v) value.push_back(v), weight.push_back(0);
      weight.back() += m;
    }
    const int64_t M = int64_t(value.size());
    const int used = int(std::min<int64_t>(K, M));
    std::vector<int32_t> starts(used);
    if (M > K) {
      starts = best_groups(value, weight, K, Workers{});
    } else {
      for (int k = 0; k < used; k++) starts[k] = k;
    }
    for (int k = 0; k < K; k++) {
      if (k >= used) {
        levels[r * K + k] = levels[r * K + used - 1];
        continue;
      }
      const int64_t end = k + 1 < used ? starts[k + 1] : M;
      double w = 0, s = 0;
      for (int64_t i = starts[k]; i < end; i++) w += weight[i], s += weight[i] * value[i];
      levels[r * K + k] = float(s / w);
    }
  });
}
