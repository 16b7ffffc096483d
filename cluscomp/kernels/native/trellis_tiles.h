// The inner loops of trellises, compiled once per instruction set. Plain pointers only: see simd.h for why.
#pragma once
#include <stdint.h>

struct TrellisTiles {
  const char* name;
  // least[g] = the least of cost[j G + g] over j < K, from[g] = the lowest such j, for g < G.
  void (*gather)(const float* cost, int64_t G, int K, float* least, uint8_t* from);
  // cost[s] = least[s / K] + (values[s] - target)^2 for s < G K. Reads up to 16 floats beyond the end of `least`.
  void (*extend)(const float* least, const float* values, float target, int64_t G, int K, float* cost);
};

const TrellisTiles& trellis_tiles();
const TrellisTiles* trellis_tiles_named(const char* name);
