#include "trellis.h"

#include <algorithm>
#include <limits>

namespace {

// What one worker needs for a sequence.
struct Passes {
  const Trellis& trellis;
  const TrellisTiles& tiles;
  const int64_t T, N, G;
  const int K;
  std::vector<float> cost, least;
  std::vector<uint8_t> from;  // (T, G): by which of its K predecessors the best path comes to the states of a group

  Passes(const Trellis& trellis, const TrellisTiles& tiles, int64_t T)
      : trellis(trellis), tiles(tiles), T(T), N(int64_t(1) << trellis.state_bits), G(N >> trellis.width),
        K(1 << trellis.width), cost(N + 16), least(G + 16), from(T * G) {}

  // The best path for targets[first], targets[first + 1], ... and round to targets[first - 1]; its states in that order.
  // With `bits` >= 0 it begins in a state whose first L - k bits these are, and ends in one whose last they are.
  void pass(const float* targets, int64_t first, int64_t bits, int32_t* states) {
    std::fill_n(least.begin(), G, bits < 0 ? 0.0f : std::numeric_limits<float>::infinity());
    if (bits >= 0) least[bits] = 0;
    for (int64_t t = 0; t < T; t++) {
      tiles.extend(least.data(), trellis.values, targets[first + t < T ? first + t : first + t - T], G, K, cost.data());
      tiles.gather(cost.data(), G, K, least.data(), from.data() + t * G);
    }
    const int64_t end = bits < 0 ? std::min_element(least.begin(), least.begin() + G) - least.begin() : bits;
    int64_t group = end;  // of the state after t; its last L - k bits are the last of the state at t
    for (int64_t t = T - 1; t >= 0; t--) {
      const int64_t state = from[t * G + group] * G + group;
      states[t] = int32_t(state);
      group = state >> trellis.width;
    }
  }
};

template <typename Work>
void for_each(const Trellis& trellis, const TrellisTiles& tiles, int64_t S, int64_t T, const Workers& workers, const Work& work) {
  std::vector<Passes> passes;
  for (int64_t w = 0; w < std::min<int64_t>(workers.threads, S); w++) passes.emplace_back(trellis, tiles, T);
  workers.run(S, [&](int64_t s, int worker) { work(s, passes[worker]); });
}

}  // namespace

void best_paths(const Trellis& trellis, const float* targets, int64_t S, int64_t T, int32_t* states, const TrellisTiles& tiles,
                const Workers& workers) {
  for_each(trellis, tiles, S, T, workers, [&](int64_t s, Passes& passes) {
    passes.pass(targets + s * T, T / 2, -1, states + s * T);
    const int64_t bits = states[s * T + T - T / 2] >> trellis.width;
    passes.pass(targets + s * T, 0, bits, states + s * T);
  });
}

void best_free_paths(const Trellis& trellis, const float* targets, int64_t S, int64_t T, int32_t* states,
                     const TrellisTiles& tiles, const Workers& workers) {
  for_each(trellis, tiles, S, T, workers,
           [&](int64_t s, Passes& passes) { passes.pass(targets + s * T, 0, -1, states + s * T); });
}

void follow_paths(const Trellis& trellis, const uint8_t* packed, int64_t S, int64_t bytes, float* numbers, const Workers& workers) {
  const int64_t together = 64, T = 8 * bytes / trellis.width;
  const uint64_t mask = (uint64_t(1) << trellis.state_bits) - 1;
  workers.run((S + together - 1) / together, [&](int64_t task, int) {
    for (int64_t s = task * together; s < std::min(S, (task + 1) * together); s++) {
      const uint8_t* path = packed + s * bytes;
      int64_t next = 0;     // byte to read
      uint64_t window = 0;  // the bits read so far, the latest lowest
      int ahead = -trellis.state_bits;  // how many of them lie behind the state
      for (int64_t t = 0; t < T; t++) {
        for (; ahead < 0; ahead += 8) {
          window = window << 8 | path[next];
          next = next + 1 < bytes ? next + 1 : 0;
        }
        numbers[s * T + t] = trellis.values[window >> ahead & mask];
        ahead -= trellis.width;
      }
    }
  });
}
