// Compiled once per instruction set, with CLUSCOMP_ISA naming it.
#include "trellis_tiles.h"

#include "simd.h"

#define STRING(x) #x
#define NAME(x) STRING(x)

namespace CLUSCOMP_ISA {

INLINE void store_bytes(uint8_t* out, const I& x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8((__m512i)x.p[0]));
#else
  int32_t numbers[16];
  store(numbers, x);
  for (int i = 0; i < 16; i++) out[i] = uint8_t(numbers[i]);
#endif
}

template <int K>
INLINE void gather_of(const float* cost, int64_t G, int many, float* least, uint8_t* from) {
  const int count = K ? K : many;
  int64_t g = 0;
  for (; g + 16 <= G; g += 16) {
    F best = load(cost + g);
    I index = every(0);
    for (int j = 1; j < count; j++) keep_less(load(cost + j * G + g), every(j), best, index);
    store(least + g, best);
    store_bytes(from + g, index);
  }
  for (; g < G; g++) {
    float best = cost[g];
    int index = 0;
    for (int j = 1; j < count; j++)
      if (cost[j * G + g] < best) best = cost[j * G + g], index = j;
    least[g] = best, from[g] = uint8_t(index);
  }
}

void gather(const float* cost, int64_t G, int K, float* least, uint8_t* from) {
  if (K == 2) gather_of<2>(cost, G, K, least, from);
  else if (K == 4) gather_of<4>(cost, G, K, least, from);
  else if (K == 8) gather_of<8>(cost, G, K, least, from);
  else if (K == 16) gather_of<16>(cost, G, K, least, from);
  else gather_of<0>(cost, G, K, least, from);
}

// Sixteen lanes: each of a[0], a[1], ... K times.
template <int K>
INLINE F each(const float* a) {
  F r;
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  constexpr int shift = K == 2 ? 1 : K == 4 ? 2 : 3;
  r.p[0] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(lanes, shift), _mm512_loadu_ps(a));
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  constexpr int shift = K == 2 ? 1 : K == 4 ? 2 : 3;
  for (int i = 0; i < P; i++)
    r.p[i] = (vf)_mm256_permutevar8x32_ps(_mm256_loadu_ps(a + i * W / K), _mm256_srli_epi32(lanes, shift));
#else
  float lanes[16];
  for (int i = 0; i < 16; i++) lanes[i] = a[i / K];
  r = load(lanes);
#endif
  return r;
}

INLINE void put(float* cost, const F& least, const float* values, const F& target) {
  const F error = load(values) - target;
  store(cost, least + error * error);
}

template <int K>
INLINE void extend_of(const float* least, const float* values, const F& target, int64_t N, float* cost) {
  for (int64_t s = 0; s < N; s += 16) put(cost + s, each<K>(least + s / K), values + s, target);
}

void extend(const float* least, const float* values, float target, int64_t G, int K, float* cost) {
  const int64_t N = G * K;
  if (N < 16) {
    for (int64_t s = 0; s < N; s++) {
      const float error = values[s] - target;
      cost[s] = least[s / K] + error * error;
    }
  } else if (K == 2) {
    extend_of<2>(least, values, all(target), N, cost);
  } else if (K == 4) {
    extend_of<4>(least, values, all(target), N, cost);
  } else if (K == 8) {
    extend_of<8>(least, values, all(target), N, cost);
  } else {
    const F targets = all(target);
    for (int64_t g = 0; g < G; g++)
      for (int j = 0; j < K; j += 16) put(cost + g * K + j, all(least[g]), values + g * K + j, targets);
  }
}

extern const TrellisTiles trellis_table;
const TrellisTiles trellis_table = {NAME(CLUSCOMP_ISA), gather, extend};

}  // namespace CLUSCOMP_ISA
