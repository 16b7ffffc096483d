#include "lloyd.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>

#include "feedback.h"
#include "kd.h"

Search fastest_search(int D, int K, bool warm) {
  if (D <= 4) return warm ? Search::lists : K >= 256 ? Search::boxes : Search::brute;
  return (D <= 10 && K >= 512) || (D <= 16 && K >= 4096) ? Search::boxes : Search::brute;
}

namespace {

constexpr int64_t PIECE = 2048;  // longest run searched in one go

struct Room {  // one worker's scratch
  explicit Room(const Tree& t)
      : integers(int64_t(t.count[0] + 1) * 4 * 16), floats(int64_t(t.count[0] + 1) * 16 * t.D) {
    const int64_t step = int64_t(t.count[0] + 1) * 16;
    scratch = {integers.data(), integers.data() + step, integers.data() + 2 * step, integers.data() + 3 * step, floats.data()};
  }
  std::vector<int32_t> integers;
  std::vector<float> floats;
  Scratch scratch;
};

// Assigns the points of `runs` (which cover all of x). Writes the slot of every point; returns the inertia.
double search_all(const Columns& x, const std::vector<Run>& runs, const Tree& tree, Search search, int32_t* slot,
                  float* distance, const Tiles& tile, const Workers& workers) {
  struct Task { size_t first, last; };
  std::vector<Run> pieces;
  for (const Run& r : runs)
    for (int64_t i = r.begin; i < r.end; i += PIECE) pieces.push_back({i, std::min(r.end, i + PIECE), r.start});
  // A task: up to 16 neighbouring pieces that start in the same leaf.
  std::vector<Task> tasks;
  for (size_t i = 0, points = 0; i < pieces.size(); i++) {
    const int64_t n = pieces[i].end - pieces[i].begin;
    const bool joins = !tasks.empty() && i - tasks.back().first < 16 && points + n <= 2 * PIECE &&
                       pieces[i].start >> 4 == pieces[tasks.back().first].start >> 4;
    if (joins) tasks.back().last = i + 1, points += n;
    else tasks.push_back({i, i + 1}), points = n;
  }
  std::vector<std::unique_ptr<Room>> rooms(workers.threads);
  std::vector<double> inertia(tasks.size(), 0);
  const int64_t batch = search == Search::brute ? 1 : 8;  // tasks handed out at a time
  workers.run((int64_t(tasks.size()) + batch - 1) / batch, [&](int64_t number, int worker) {
    if (!rooms[worker]) rooms[worker] = std::make_unique<Room>(tree);
    const Scratch& scratch = rooms[worker]->scratch;
    for (int64_t t = number * batch; t < std::min<int64_t>(tasks.size(), (number + 1) * batch); t++) {
      const Run* run = &pieces[tasks[t].first];
      const int n = int(tasks[t].last - tasks[t].first);
      if (search == Search::lists && run->start >= 0) tile.lists(x, run, n, tree, scratch, slot, distance);
      for (int r = 0; r < n; r++) {
        if (search == Search::brute) tile.brute(x, run[r].begin, run[r].end, tree, slot, distance);
        else if (search == Search::boxes || run->start < 0) tile.boxes(x, run[r], tree, scratch, slot, distance);
        inertia[t] += tile.total(x, run[r].begin, run[r].end, distance + run[r].begin);
      }
    }
  });
  double sum = 0;
  for (double part : inertia) sum += part;
  return sum;
}

// Moves the points so that those of each slot lie together, in their present order; returns where each slot begins.
std::vector<int64_t> sort_by_slot(const Columns& from, const Columns& to, const int32_t* slot, int K, const Workers& workers) {
  const int64_t parts = workers.threads, n = from.n;
  std::vector<std::vector<uint32_t>> place(parts);
  workers.run(parts, [&](int64_t p, int) {
    place[p].assign(K, 0);
    for (int64_t i = n * p / parts; i < n * (p + 1) / parts; i++) place[p][slot[i]]++;
  });
  std::vector<int64_t> begin(K + 1, 0);
  uint32_t at = 0;
  for (int k = 0; k < K; k++) {
    begin[k] = at;
    for (int64_t p = 0; p < parts; p++) {
      const uint32_t count = place[p][k];
      place[p][k] = at;
      at += count;
    }
  }
  begin[K] = n;
  workers.run(parts, [&](int64_t p, int) {
    uint32_t target[2048];
    const int64_t end = n * (p + 1) / parts;
    for (int64_t i = n * p / parts; i < end; i += 2048) {
      const int m = int(std::min<int64_t>(2048, end - i));
      int32_t now = slot[i];  // neighbours mostly share a slot: its place is kept out of memory
      uint32_t at = place[p][now];
      for (int j = 0; j < m; j++) {
        if (slot[i + j] != now) {
          place[p][now] = at;
          now = slot[i + j];
          at = place[p][now];
        }
        target[j] = at++;
      }
      place[p][now] = at;
      for (int d = 0; d < from.rows(); d++) {
        const float* a = from.row(d) + i;
        float* b = to.row(d);
        for (int j = 0; j < m; j++) b[target[j]] = a[j];
      }
    }
  });
  return begin;
}

struct Random {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  double uniform() { return (next() >> 11) * 0x1p-53; }
};

// faiss' rule: an empty cluster takes over half of one drawn with probability ~ its points less one;
// both centroids start 1/1024 away from the old one.
void refill_as_faiss(std::vector<float>& c, const std::vector<int64_t>& begin, int D, Random& random) {
  const int K = int(begin.size()) - 1;
  std::vector<double> upto(K);
  double sum = 0;
  for (int k = 0; k < K; k++) upto[k] = sum += std::max<int64_t>(0, begin[k + 1] - begin[k] - 1);
  for (int k = 0; k < K && sum > 0; k++) {
    if (begin[k + 1] > begin[k]) continue;
    const int donor = int(std::upper_bound(upto.begin(), upto.end(), random.uniform() * sum) - upto.begin());
    for (int d = 0; d < D; d++) {
      const float v = c[int64_t(donor) * D + d], up = v * (1 + 1.f / 1024), down = v * (1 - 1.f / 1024);
      c[int64_t(k) * D + d] = d % 2 ? down : up;
      c[int64_t(donor) * D + d] = d % 2 ? up : down;
    }
  }
}

// Empty clusters give their centroid to the worst ones, which are cut in two along their widest axis.
// (Giving away those of the cheapest clusters too was measured: it helps a random start, but with kd and
// over-relaxation the inertia after 20 rounds rose by 0.1 to 3 %.) moments: (K, 1 + 2D). True if any was moved.
bool move_to_worst(std::vector<float>& c, const std::vector<double>& moments, const std::vector<int64_t>& begin, int D) {
  const int K = int(begin.size()) - 1, width = 1 + 2 * D;
  auto variance = [&](int k, int d) {
    const double *m = &moments[int64_t(k) * width], mean = m[1 + d] / m[0];
    return m[0] > 0 ? std::max(0.0, m[1 + D + d] / m[0] - mean * mean) : 0.0;
  };
  std::vector<double> cost(K, 0);
  std::vector<int32_t> empty, order(K);
  for (int k = 0; k < K; k++) {
    for (int d = 0; d < D; d++) cost[k] += moments[int64_t(k) * width] * variance(k, d);
    if (begin[k + 1] == begin[k]) empty.push_back(k);
  }
  const size_t moves = std::min(empty.size(), size_t(K) / 2);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + moves, order.end(),
                    [&](int32_t a, int32_t b) { return cost[a] > cost[b] || (cost[a] == cost[b] && a < b); });
  for (size_t i = 0; i < moves; i++) {
    const int32_t worst = order[i];
    if (cost[worst] <= 0) return i > 0;
    int axis = 0;
    for (int d = 1; d < D; d++)
      if (variance(worst, d) > variance(worst, axis)) axis = d;
    const float shift = float(0.8 * std::sqrt(variance(worst, axis)));  // to the means of a normal's halves
    std::copy_n(&c[int64_t(worst) * D], D, &c[int64_t(empty[i]) * D]);
    c[int64_t(empty[i]) * D + axis] += shift;
    c[int64_t(worst) * D + axis] -= shift;
  }
  return moves > 0;
}

// Puts the centroids in spatial order and renames the runs' starts to match.
void reorder(std::vector<float>& c, std::vector<Run>& runs, int K, int D, const Workers& workers) {
  const std::vector<int32_t> order = spatial_order(c.data(), K, D, workers);
  std::vector<float> old(c);
  std::vector<int32_t> rank(K);
  for (int s = 0; s < K; s++) {
    rank[order[s]] = s;
    std::copy_n(&old[int64_t(order[s]) * D], D, &c[int64_t(s) * D]);
  }
  for (Run& r : runs)
    if (r.start >= 0) r.start = rank[r.start];
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.start != b.start ? a.start < b.start : a.begin < b.begin; });
}

}  // namespace

LloydResult lloyd(const Cloud& cloud, const LloydSettings& set, int32_t* codes_N, const Tiles& tile, const Workers& workers) {
  const int64_t N = cloud.columns.n;
  const int K = set.K, D = cloud.columns.D;
  Cloud second(N, D, cloud.columns.weighted);
  Columns x = cloud.columns, spare = second.columns;
  std::vector<int32_t> slot(N);
  std::unique_ptr<float[]> distance(new float[N]);
  std::vector<float> c(int64_t(K) * D), best_c;
  std::vector<Run> runs{{0, N, -1}};  // where points lie, and the centroid their search starts from
  CentroidTree tree;
  Random random{set.seed};
  LloydResult result;
  double best = std::numeric_limits<double>::infinity();
  bool disturbed = true;

  if (set.kd) runs = kd_split(x, spare, K, c.data(), set.seed, tile, workers);
  else c = set.first;

  for (int done = 0;; done++) {
    // Centroids drift: put them in order again after 0, 1, 3, 7, 15, ... iterations, and whenever some were moved.
    if (disturbed || (done & (done + 1)) == 0) reorder(c, runs, K, D, workers);
    tree.build(c.data(), K, D);
    const bool warm = runs.front().start >= 0;
    const Search search = set.search == Search::choose ? fastest_search(D, K, warm) : set.search;
    double inertia = search_all(x, runs, tree.tree, search, slot.data(), distance.get(), tile, workers);
    const bool rose = inertia > best;
    if (done == set.iterations && rose) {  // the best codebook seen is kept
      c = best_c;
      runs = {{0, N, -1}};
      reorder(c, runs, K, D, workers);
      tree.build(c.data(), K, D);
      inertia = search_all(x, runs, tree.tree, Search::boxes, slot.data(), distance.get(), tile, workers);
    }
    if (inertia < best) best = inertia, best_c = c;
    result.inertia.push_back(inertia);
    if (set.progress) set.progress(done, inertia);
    if (done == set.iterations) break;

    const std::vector<int64_t> begin = sort_by_slot(x, spare, slot.data(), K, workers);
    std::swap(x, spare);
    const float step = done >= set.iterations - 3 || rose ? 1.f : set.over_relaxation;
    const int width = 1 + 2 * D;
    std::vector<double> moments(int64_t(K) * width);
    workers.run((K + 255) / 256, [&](int64_t block, int) {
      for (int64_t k = block * 256; k < std::min<int64_t>(K, block * 256 + 256); k++) {
        double* m = &moments[k * width];
        if (begin[k] == begin[k + 1]) continue;
        tile.moments(x, begin[k], begin[k + 1], m);
        for (int d = 0; d < D && m[0] > 0; d++) c[k * D + d] += step * float(m[1 + d] / m[0] - c[k * D + d]);
      }
    });
    runs.clear();
    for (int k = 0; k < K; k++)
      if (begin[k] < begin[k + 1]) runs.push_back({begin[k], begin[k + 1], k});
    disturbed = false;
    if (!set.move_centroids) refill_as_faiss(c, begin, D, random);
    else if (done < set.iterations - 3) disturbed = move_to_worst(c, moments, begin, D);
  }
  workers.run((N + 65535) / 65536, [&](int64_t block, int) {
    for (int64_t i = block * 65536; i < std::min(N, (block + 1) * 65536); i++) codes_N[x.number()[i]] = slot[i];
  });
  result.centroids = std::move(c);
  return result;
}

Index::Index(const float* centroids_KD, int K, int D, Search search, const int32_t* order, const Workers& workers)
    : K(K), D(D), search_(search), centroids_(centroids_KD, centroids_KD + int64_t(K) * D) {
  if (search_ == Search::choose) search_ = fastest_search(D, K, false);
  if (search_ == Search::lists) search_ = Search::boxes;
  if (search_ == Search::brute) {
    tree_.build(centroids_KD, K, D);
    return;
  }
  if (order) order_.assign(order, order + K);
  else order_ = spatial_order(centroids_KD, K, D, workers);
  std::vector<float> c(int64_t(K) * D);
  for (int s = 0; s < K; s++) std::copy_n(centroid(order_[s]), D, &c[int64_t(s) * D]);
  tree_.build(c.data(), K, D, order_);
}

void Index::search(const Columns& x, int32_t* codes_N, float* distances_N, const Tiles& tile, const Workers& workers) const {
  search_all(x, {{0, x.n, -1}}, tree_.tree, search_, codes_N, distances_N, tile, workers);
  if (order_.empty()) return;
  for (int64_t i = 0; i < x.n; i++) codes_N[i] = order_[codes_N[i]];
}

void feedback(const Index& index, const Rounds& r, const Tiles& tile, const Workers& workers) {
  constexpr int n = 64;  // groups of a task: they pass through all rounds by themselves
  const int D = index.D;
  const int64_t width = r.groups * D;
  std::vector<std::unique_ptr<Room>> rooms(workers.threads);
  workers.run((r.groups + n - 1) / n, [&](int64_t task, int worker) {
    if (!rooms[worker]) rooms[worker] = std::make_unique<Room>(index.tree_.tree);
    const int64_t first = task * n, begin = first * D, end = std::min(r.outputs, begin + n * D);
    std::vector<float> columns((D + 1) * (n + 80)), distance(n);
    const Columns x{columns.data(), n + 80, std::min<int64_t>(n, r.groups - first), D, 0};
    int32_t slot[n];
    for (int64_t i = 0; i < r.rounds; i++) {
      float* wanted = r.wanted + i * width;
      for (int64_t g = 0; g < x.n; g++)
        for (int d = 0; d < D; d++) {
          const float value = wanted[begin + g * D + d];
          if (!(std::fabs(value) <= 1e15f))
            throw std::invalid_argument("wanted[" + std::to_string(i) + ", " + std::to_string(begin + g * D + d) + "] is " +
                                        std::to_string(value) + "; every value must be finite and within 1e+15");
          x.row(d)[g] = value;
        }
      if (index.search_ == Search::brute) tile.brute(x, 0, x.n, index.tree_.tree, slot, distance.data());
      else tile.boxes(x, {0, x.n, -1}, index.tree_.tree, rooms[worker]->scratch, slot, distance.data());
      float* error = r.errors + i * r.outputs;
      const float* base = r.before ? r.before + i * width : wanted;
      const float* factor = r.factor + i * r.rounds;
      for (int64_t g = 0; g < x.n; g++) {
        const int32_t code = index.order_.empty() ? slot[g] : index.order_[slot[g]];
        r.codes[i * r.groups + first + g] = code;
        const float* c = index.centroid(code);
        for (int64_t o = begin + g * D; o < std::min(end, begin + (g + 1) * D); o++) error[o] = (base[o] - c[o - begin - g * D]) / factor[i];
      }
      for (int64_t j = i + 1; j < r.rounds; j++) tile.subtract(r.wanted + j * width + begin, error + begin, factor[j], end - begin);
    }
  });
}
