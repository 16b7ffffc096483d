// Rows rounded to levels of two interleaved grids, on the path through eight states that costs least.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <vector>

#include "integers.h"

// Dependent quantisation (Schwarz et al., DCC 2019; the eight states are those of the video coding standard VVC). In a
// state the levels are 2 k, or in odd states 2 k - sign(k); k's parity says which state is next. A row begins in state 0.
struct Paths {
  static constexpr int states = 8;
  static constexpr uint8_t next[8][2] = {{0, 2}, {5, 7}, {1, 3}, {6, 4}, {2, 0}, {4, 6}, {3, 1}, {7, 5}};
};

inline int sign_of(int x) { return (x > 0) - (x < 0); }

// The number k of a level in an odd or even state.
inline int number_of(int level, int in_odd) { return (level + in_odd * sign_of(level)) / 2; }

// The numbers k and whether the state is odd, of rows of levels. A level that its state does not have becomes another
// one's number; whoever wrote it finds that it does not come back.
inline void symbols_of(int64_t inputs, int64_t outputs, const int8_t* levels, int8_t* symbols, uint8_t* odd) {
  for (int64_t i = 0; i < inputs; ++i) {
    int state = 0;
    for (int64_t o = 0; o < outputs; ++o) {
      const int level = levels[i * outputs + o], in_odd = state & 1;
      const int k = number_of(level, in_odd);
      symbols[i * outputs + o] = int8_t(k);
      odd[i * outputs + o] = uint8_t(in_odd);
      state = Paths::next[state][k & 1];
    }
  }
}

// Nearest levels to u of even states with k even and k odd, then of odd states with k even and k odd.
inline void nearest_levels(double u, int* level) {
  const double size = std::fabs(u);
  const int sign = u < 0 ? -1 : 1;
  level[0] = 4 * int(std::nearbyint(u / 4));
  level[1] = 4 * int(std::floor(u / 4)) + 2;
  level[2] = size < 1.5 ? 0 : sign * std::max(3, 4 * int(std::nearbyint((size + 1) / 4)) - 1);
  level[3] = sign * (4 * std::max(0, int(std::nearbyint((size - 1) / 4))) + 1);
}

// The next level of the same kind (0 to 3 as above) towards 0; itself where there is none.
inline int smaller_level(int level, int kind) {
  const int size = std::abs(level), sign = sign_of(level);
  if (kind == 2) return size == 3 ? 0 : size > 3 ? level - 4 * sign : level;
  return size >= 4 ? level - 4 * sign : level;
}

// What `round_rows` does, with levels of size 127 at most in the place of whole numbers. Of all paths that of row i has the
// least sum of (wanted / step - level)^2 + price * lengths[table][128 + k]; the table is rows[i], in odd states `tables` more.
inline void round_on_paths(int64_t rounds, int64_t outputs, float* wanted, const float* factor, const float* steps, const uint8_t* rows,
                           const float* lengths, int64_t tables, double price, int8_t* levels, float* scales, float* errors) {
  const double infinity = std::numeric_limits<double>::infinity();
  std::vector<uint8_t> from(outputs * Paths::states);
  std::vector<int8_t> near(outputs * 4);
  for (int64_t i = 0; i < rounds; ++i) {
    float *row = wanted + i * outputs, *error = errors + i * outputs, largest = 0;
    for (int64_t o = 0; o < outputs; ++o) largest = std::fabs(row[o]) > largest ? std::fabs(row[o]) : largest;
    const float step = largest / 120 > steps[i] ? largest / 120 : steps[i];
    const float* length[2] = {lengths + rows[i] * 256 + 128, lengths + (rows[i] + tables) * 256 + 128};
    double cost[Paths::states] = {0, infinity, infinity, infinity, infinity, infinity, infinity, infinity};
    for (int64_t o = 0; o < outputs; ++o) {
      double u = double(row[o]) / step, reached[Paths::states], least[4];
      u = u > -121 ? u : -121;  // what is no number becomes one
      u = u < 121 ? u : 121;
      int level[4];
      nearest_levels(u, level);
      for (int kind = 0; kind < 4; ++kind) {
        const int other = smaller_level(level[kind], kind), in_odd = kind / 2;
        const double one = (level[kind] - u) * (level[kind] - u) + price * length[in_odd][number_of(level[kind], in_odd)];
        const double two = (other - u) * (other - u) + price * length[in_odd][number_of(other, in_odd)];
        near[o * 4 + kind] = int8_t(two < one ? other : level[kind]);
        least[kind] = two < one ? two : one;
      }
      for (double& r : reached) r = infinity;
      for (int state = 0; state < Paths::states; ++state)
        for (int parity = 0; parity < 2; ++parity) {
          const int to = Paths::next[state][parity];
          const double all = cost[state] + least[(state & 1) * 2 + parity];
          if (all < reached[to]) reached[to] = all, from[o * Paths::states + to] = uint8_t(state);
        }
      for (int state = 0; state < Paths::states; ++state) cost[state] = reached[state];
    }
    int state = 0;
    for (int s = 1; s < Paths::states; ++s) state = cost[s] < cost[state] ? s : state;
    double product = 0, size = 0;
    for (int64_t o = outputs - 1; o >= 0; --o) {
      const int before = from[o * Paths::states + state], parity = Paths::next[before][1] == state;
      error[o] = levels[i * outputs + o] = near[o * 4 + (before & 1) * 2 + parity];
      state = before;
    }
    for (int64_t o = 0; o < outputs; ++o) product += double(error[o]) * row[o], size += double(error[o]) * error[o];
    const float scale = scales[i] = size > 0 ? leading_bits(float(product / size)) : step;
    hand_on(i, rounds, outputs, wanted, factor, scale, error);
  }
}
