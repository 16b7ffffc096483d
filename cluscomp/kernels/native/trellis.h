// The best path through a bitshift trellis (QTIP, arXiv 2406.11235, section 3), tail-biting.
#pragma once
#include "trellis_tiles.h"
#include "threads.h"

// A state of L bits is followed by (state << k | j) mod 2^L, for each j below 2^k, and stands for values[state].
struct Trellis {
  int state_bits, width;  // L and k < L, k <= 8
  const float* values;    // (2^L)
};

// For each of S sequences of T targets the states (S, T) of a path that is near them, by least squared error, and whose
// end runs into its beginning: the last L - k bits of the last state are the first ones of the first. Needs T k >= L.
// Two passes, as the paper's Algorithm 4: one from the middle on and round, which finds these L - k bits, one with them.
// Differences, squares and sums are rounded one by one, and the lowest number wins a tie: the result is the same on
// every machine and for any number of threads.
void best_paths(const Trellis&, const float* targets, int64_t S, int64_t T, int32_t* states, const TrellisTiles&, const Workers&);

// The same without a condition on the ends: exactly the least squared error there is.
void best_free_paths(const Trellis&, const float* targets, int64_t S, int64_t T, int32_t* states, const TrellisTiles&,
                     const Workers&);

// The numbers (S, T), T = 8 bytes / k, of packed tail-biting paths of so many bytes each. A state is a window of L bits
// at each k-th bit, the first bit of a byte being its highest; windows go round the end.
void follow_paths(const Trellis&, const uint8_t* packed, int64_t S, int64_t bytes, float* numbers, const Workers&);
