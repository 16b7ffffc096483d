// Codes chosen round by round, each round's error handed on to the rounds to come.
#pragma once
#include "lloyd.h"

// Round i: the rows wanted[i] (groups of D) take their nearest centroids; errors[i] = (base - centroids) / factor[i, i],
// where base is before[i], or wanted[i] where there is no `before`; then wanted[j] -= factor[i, j] errors[i] for j > i.
// Every product and difference is rounded by itself, so results are the same on every machine.
struct Rounds {
  int64_t rounds, groups, outputs;  // the last group may reach beyond the outputs: its padding is never changed
  float* wanted;                    // (rounds, groups * D), overwritten
  const float* before;              // the same, or null
  const float* factor;              // (rounds, rounds), its upper triangle
  int32_t* codes;                   // (rounds, groups)
  float* errors;                    // (rounds, outputs)
};

void feedback(const Index&, const Rounds&, const Tiles&, const Workers&);
