// Each piece is cut at the mean of its axis of largest variance (give or take a twentieth of the deviation, drawn with the
// seed: other seeds find other optima of about the same worth), and its budget of centroids is shared between
// the two halves as the optimal density of a fine quantiser asks: centroids lie as p^(D/(D+2)) where points lie
// as p (Zador). For a piece of mass m and variance v on all axes the integral of that is (m * v)^(D/(D+2)) up to a factor.
// Where variances differ theory asks for their geometric mean; their sum gave the same inertia and bears flat axes.
#include "kd.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr double DITHER = 0.05;
constexpr int64_t CHUNK = 65536;  // sums are formed per chunk, then chunk by chunk: the same for any number of threads

struct Piece {
  int64_t begin, end;
  int first, budget;  // its centroids are first ... first + budget - 1
  bool spare;         // its points lie in the spare columns
  std::vector<double> moments;
};

struct Splitter {
  const Columns& x;
  const Columns& spare;
  const int K;
  float* const centroids;
  const uint64_t seed;
  const Tiles& tile;
  const int D = x.D;

  double variance(const Piece& p, int d) const {
    const double mean = p.moments[1 + d] / p.moments[0];
    return std::max(0.0, p.moments[1 + D + d] / p.moments[0] - mean * mean);
  }

  // The share of the budget a piece asks for; 0 where all its points are equal or without weight.
  double share(const Piece& p) const {
    if (!(p.moments[0] > 0)) return 0;
    double sum = 0;
    for (int d = 0; d < D; d++) sum += variance(p, d);
    return std::pow(p.moments[0] * sum, double(D) / (D + 2));
  }

  // Uniform in [-1, 1), by the seed and the piece's centroids: splitmix64's mixing of both.
  double draw(const Piece& p) const {
    uint64_t z = seed + 0x9e3779b97f4a7c15u * (uint64_t(p.first) * 65537 + uint64_t(p.budget));
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return double(int64_t(z ^ (z >> 31)) >> 11) * 0x1p-52;
  }

  void measure(Piece& p, const Workers& workers) const {
    const Columns& from = p.spare ? spare : x;
    const int64_t chunks = (p.end - p.begin + CHUNK - 1) / CHUNK;
    const int width = 1 + 2 * D;
    std::vector<double> parts(chunks * width);
    workers.run(chunks, [&](int64_t c, int) {
      const int64_t begin = p.begin + c * CHUNK;
      tile.moments(from, begin, std::min(p.end, begin + CHUNK), &parts[c * width]);
    });
    p.moments.assign(width, 0);
    for (int64_t c = 0; c < chunks; c++)
      for (int i = 0; i < width; i++) p.moments[i] += parts[c * width + i];
  }

  // Splits p in two; false where it cannot be split.
  bool split(const Piece& p, Piece& a, Piece& b, const Workers& workers) const {
    if (p.budget < 2 || !(p.moments[0] > 0)) return false;
    int axis = 0;
    for (int d = 1; d < D; d++)
      if (variance(p, d) > variance(p, axis)) axis = d;
    const double mean = p.moments[1 + axis] / p.moments[0], moved = mean + DITHER * draw(p) * std::sqrt(variance(p, axis));
    return cut(p, a, b, axis, float(moved), workers) || cut(p, a, b, axis, float(mean), workers);
  }

  // Splits p at a threshold; false where one side would be empty.
  bool cut(const Piece& p, Piece& a, Piece& b, int axis, float threshold, const Workers& workers) const {
    const Columns &from = p.spare ? spare : x, &to = p.spare ? x : spare;
    const int64_t chunks = (p.end - p.begin + CHUNK - 1) / CHUNK;
    std::vector<int64_t> low(chunks + 1, 0);
    workers.run(chunks, [&](int64_t c, int) {
      const int64_t begin = p.begin + c * CHUNK;
      low[c + 1] = tile.count_low(from, begin, std::min(p.end, begin + CHUNK), axis, threshold);
    });
    for (int64_t c = 0; c < chunks; c++) low[c + 1] += low[c];
    const int64_t middle = p.begin + low[chunks];
    if (middle == p.begin || middle == p.end) return false;
    workers.run(chunks, [&](int64_t c, int) {
      const int64_t begin = p.begin + c * CHUNK;
      tile.split(from, to, begin, std::min(p.end, begin + CHUNK), axis, threshold, p.begin + low[c], middle + c * CHUNK - low[c]);
    });
    a = {p.begin, middle, p.first, 0, !p.spare, {}};
    b = {middle, p.end, 0, 0, !p.spare, {}};
    measure(a, workers), measure(b, workers);
    const double wants_a = share(a), wants_b = share(b);
    double part = wants_a + wants_b > 0 ? wants_a / (wants_a + wants_b) : 0.5;
    // One centroid each at least, and no more than points.
    int64_t k = std::llround(part * p.budget);
    k = std::max<int64_t>(k, std::max<int64_t>(1, p.budget - (p.end - middle)));
    k = std::min<int64_t>(k, std::min<int64_t>(p.budget - 1, middle - p.begin));
    a.budget = int(k), b.budget = p.budget - a.budget, b.first = a.first + a.budget;
    return true;
  }

  // A piece that is not split any more: its mean is the centroid (of all its budget, where its points are equal).
  Run finish(const Piece& p) const {
    if (p.spare)
      for (int d = 0; d < x.rows(); d++) std::memcpy(x.row(d) + p.begin, spare.row(d) + p.begin, (p.end - p.begin) * 4);
    for (int d = 0; d < D; d++) {
      float mean = x.row(d)[p.begin];
      if (p.moments[0] > 0) mean = float(p.moments[1 + d] / p.moments[0]);
      for (int k = p.first; k < p.first + p.budget; k++) centroids[int64_t(k) * D + d] = mean;
    }
    return {p.begin, p.end, p.first};
  }

  void finish_all(const Piece& root, std::vector<Run>& runs) const {
    const Workers alone;
    std::vector<Piece> open{root};
    while (!open.empty()) {
      Piece p = std::move(open.back()), a, b;
      open.pop_back();
      if (split(p, a, b, alone)) open.push_back(std::move(b)), open.push_back(std::move(a));
      else runs.push_back(finish(p));
    }
  }
};

}  // namespace

std::vector<Run> kd_split(const Columns& x, const Columns& spare, int K, float* centroids_KD, uint64_t seed, const Tiles& tile,
                          const Workers& workers) {
  const Splitter splitter{x, spare, K, centroids_KD, seed, tile};
  Piece all{0, x.n, 0, K, false, {}};
  splitter.measure(all, workers);
  std::vector<Piece> large{all}, small;
  std::vector<Run> runs;
  while (!large.empty()) {  // all threads on one piece
    Piece p = std::move(large.back()), a, b;
    large.pop_back();
    if (p.end - p.begin <= 4 * CHUNK) small.push_back(std::move(p));
    else if (splitter.split(p, a, b, workers)) large.push_back(std::move(b)), large.push_back(std::move(a));
    else runs.push_back(splitter.finish(p));
  }
  std::vector<std::vector<Run>> found(small.size());  // then one thread a piece
  workers.run(int64_t(small.size()), [&](int64_t i, int) { splitter.finish_all(small[i], found[i]); });
  for (auto& f : found) runs.insert(runs.end(), f.begin(), f.end());
  return runs;
}
