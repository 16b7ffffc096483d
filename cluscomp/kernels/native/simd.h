// Sixteen float lanes, whatever the machine: one AVX-512 register, two of AVX2, four of SSE2 or NEON.
//
// Included only by the tile files, which are compiled once per instruction set; everything lives in a
// namespace of that set's name and is inlined, so no code for a newer machine can leak into an older one.
// For the same reason nothing of the standard library's templates is used here.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace CLUSCOMP_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int P = 16 / W;  // native registers in sixteen lanes

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));

struct F { vf p[P]; };  // 16 floats
struct I { vi p[P]; };  // 16 integers

// Register by register: copied as one block of 64 bytes, GCC keeps what is more than one register in memory.
INLINE F load(const float* a) { F r; for (int i = 0; i < P; i++) memcpy(&r.p[i], a + i * W, 4 * W); return r; }
INLINE void store(float* a, const F& x) { for (int i = 0; i < P; i++) memcpy(a + i * W, &x.p[i], 4 * W); }
INLINE void store(int32_t* a, const I& x) { for (int i = 0; i < P; i++) memcpy(a + i * W, &x.p[i], 4 * W); }
INLINE F all(float a) { F r; for (int i = 0; i < P; i++) r.p[i] = a - vf{}; return r; }
INLINE I every(int32_t a) { I r; for (int i = 0; i < P; i++) r.p[i] = a - vi{}; return r; }
INLINE F operator+(const F& a, const F& b) { F r; for (int i = 0; i < P; i++) r.p[i] = a.p[i] + b.p[i]; return r; }
INLINE F operator-(const F& a, const F& b) { F r; for (int i = 0; i < P; i++) r.p[i] = a.p[i] - b.p[i]; return r; }
INLINE F operator*(const F& a, const F& b) { F r; for (int i = 0; i < P; i++) r.p[i] = a.p[i] * b.p[i]; return r; }
// a * b + c with one rounding where the machine has FMA. Asked for by name, never left to the compiler (the tiles are
// compiled with -ffp-contract=off): a distance must come out the same to the last bit wherever it is computed.
INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
INLINE float fma(float a, float b, float c) {
#if defined(__AVX2__) || (defined(__ARM_NEON) && defined(__aarch64__))
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
INLINE F fma(const F& a, const F& b, const F& c) { F r; for (int i = 0; i < P; i++) r.p[i] = fma(a.p[i], b.p[i], c.p[i]); return r; }
INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
INLINE F min(const F& a, const F& b) { F r; for (int i = 0; i < P; i++) r.p[i] = min(a.p[i], b.p[i]); return r; }
INLINE F max(const F& a, const F& b) { F r; for (int i = 0; i < P; i++) r.p[i] = max(a.p[i], b.p[i]); return r; }

// Where d < best: best = d and index = j.
INLINE void keep_less(const F& d, const I& j, F& best, I& index) {
  for (int i = 0; i < P; i++) {
#if defined(__AVX512F__)
    const __mmask16 less = _mm512_cmp_ps_mask((__m512)d.p[i], (__m512)best.p[i], _CMP_LT_OQ);
    index.p[i] = (vi)_mm512_mask_mov_epi32((__m512i)index.p[i], less, (__m512i)j.p[i]);
#else
    const vi less = d.p[i] < best.p[i];
    index.p[i] = less ? j.p[i] : index.p[i];
#endif
    best.p[i] = min(d.p[i], best.p[i]);
  }
}

INLINE float lowest(const F& a) { float b[16], m; store(b, a); m = b[0]; for (int i = 1; i < 16; i++) m = b[i] < m ? b[i] : m; return m; }
INLINE float highest(const F& a) { float b[16], m; store(b, a); m = b[0]; for (int i = 1; i < 16; i++) m = b[i] > m ? b[i] : m; return m; }

// One bit per lane: a <= b.
INLINE uint32_t mask_le(const F& a, const F& b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a.p[0], (__m512)b.p[0], _CMP_LE_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a.p[0], (__m256)b.p[0], _CMP_LE_OQ)) |
         _mm256_movemask_ps(_mm256_cmp_ps((__m256)a.p[1], (__m256)b.p[1], _CMP_LE_OQ)) << 8;
#else
  float x[16], y[16];
  store(x, a), store(y, b);
  uint32_t m = 0;
  for (int i = 0; i < 16; i++) m |= uint32_t(x[i] <= y[i]) << i;
  return m;
#endif
}

INLINE int count(uint32_t mask) { return __builtin_popcount(mask); }

// Write the lanes named by the mask, closed up, to out; up to 16 floats of out may be overwritten.
INLINE void pack(float* out, const F& a, uint32_t mask) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, (__m512)a.p[0]));
#else
  float b[16];
  store(b, a);
  for (; mask; mask &= mask - 1) *out++ = b[__builtin_ctz(mask)];
#endif
}

// The same, writing exactly as many floats as the mask has bits.
INLINE void pack_exactly(float* out, const F& a, uint32_t mask) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(out, (1u << count(mask)) - 1, _mm512_maskz_compress_ps(mask, (__m512)a.p[0]));
#else
  pack(out, a, mask);
#endif
}

// base + lane number of every lane in the mask, closed up; up to 16 integers of out may be overwritten.
INLINE void pack_lanes(int32_t* out, int32_t base, uint32_t mask) {
#if defined(__AVX512F__)
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lane, _mm512_set1_epi32(base))));
#else
  for (; mask; mask &= mask - 1) *out++ = base + __builtin_ctz(mask);
#endif
}

}  // namespace CLUSCOMP_ISA
