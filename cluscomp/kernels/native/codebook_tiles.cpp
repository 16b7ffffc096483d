// Compiled once per instruction set, with CLUSCOMP_ISA naming it.
#include "codebook_tiles.h"

#include "simd.h"

#define STRING(x) #x
#define NAME(x) STRING(x)

namespace CLUSCOMP_ISA {

// D floats at a time; D is known when compiling where it is 2, 4, 8 or 16, else rounded up to sixteen lanes.
template <int D>
struct Entry {
  float v[D];
};

template <int D>
INLINE void expand_entries(const uint16_t* code, int64_t n, const float* table, float* out) {
  for (int64_t g = 0; g < n; g++) {
    Entry<D> e;
    memcpy(&e, table + int64_t(code[g]) * D, sizeof e);
    memcpy(out + g * D, &e, sizeof e);
  }
}

#if defined(__AVX512F__)
// Four entries of four floats make one register.
INLINE __m512 four_entries(const uint16_t* code, const float* table) {
  __m256 a = _mm256_castps128_ps256(_mm_loadu_ps(table + 4 * int64_t(code[0])));
  __m256 b = _mm256_castps128_ps256(_mm_loadu_ps(table + 4 * int64_t(code[2])));
  a = _mm256_insertf128_ps(a, _mm_loadu_ps(table + 4 * int64_t(code[1])), 1);
  b = _mm256_insertf128_ps(b, _mm_loadu_ps(table + 4 * int64_t(code[3])), 1);
  return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1);
}
INLINE __m512 four_entries(const uint16_t* code, const uint16_t* table) {
  uint64_t e[4];
  for (int i = 0; i < 4; i++) memcpy(e + i, table + 4 * int64_t(code[i]), 8);
  return _mm512_cvtph_ps(_mm256_setr_epi64x(e[0], e[1], e[2], e[3]));
}
#endif

INLINE void expand_fours(const uint16_t* code, int64_t n, const float* table, float* out) {
  int64_t g = 0;
#if defined(__AVX512F__)
  for (; g + 4 <= n; g += 4) _mm512_storeu_ps(out + 4 * g, four_entries(code + g, table));
#endif
  expand_entries<4>(code + g, n - g, table, out + 4 * g);
}

INLINE float widened(float v) { return v; }
INLINE float widened(uint16_t v) {
#if defined(__AVX512F__)
  return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16(v)));
#else
  return v;  // never used: add_halves is null here
#endif
}

template <typename T>
INLINE void add_entries(float a, const uint16_t* code, int64_t n, const T* table, float* y) {
  int64_t g = 0;
#if defined(__AVX512F__)
  for (; g + 4 <= n; g += 4)
    _mm512_storeu_ps(y + 4 * g, _mm512_fmadd_ps(_mm512_set1_ps(a), four_entries(code + g, table), _mm512_loadu_ps(y + 4 * g)));
#endif
  for (; g < n; g++)
    for (int d = 0; d < 4; d++) y[4 * g + d] = fma(a, widened(table[4 * int64_t(code[g]) + d]), y[4 * g + d]);
}
void add_fours(float a, const uint16_t* code, int64_t n, const float* table, float* y) { add_entries(a, code, n, table, y); }
#if defined(__AVX512F__)
void add_halves(float a, const uint16_t* code, int64_t n, const uint16_t* table, float* y) { add_entries(a, code, n, table, y); }
#else
constexpr auto add_halves = nullptr;
#endif

void expand(const uint16_t* code, int64_t n, const float* table, int D, float* out) {
  switch (D) {
    case 2: return expand_entries<2>(code, n, table, out);
    case 4: return expand_fours(code, n, table, out);
    case 8: return expand_entries<8>(code, n, table, out);
  }
  for (int64_t g = 0; g < n; g++)  // sixteen floats of which D count: the next entry overwrites the rest
    for (int d = 0; d < D; d += 16) store(out + g * D + d, load(table + int64_t(code[g]) * D + d));
}

void add_multiple(float a, const float* x, float* y, int64_t n) {
  const F factor = all(a);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, fma(factor, load(x + i), load(y + i)));
  for (; i < n; i++) y[i] = fma(a, x[i], y[i]);
}

template <int D>
INLINE void scatter_entries(const uint16_t* code, int64_t n, const float* x, float* sum) {
  typedef float v __attribute__((vector_size(D * 4)));
  for (int64_t g = 0; g < n; g++) {
    v a, b;
    float* to = sum + int64_t(code[g]) * D;
    memcpy(&a, to, sizeof a), memcpy(&b, x + g * D, sizeof b);
    a += b;
    memcpy(to, &a, sizeof a);
  }
}

void scatter(const uint16_t* code, int64_t n, const float* x, int D, float* sum) {
  switch (D) {
    case 2: return scatter_entries<2>(code, n, x, sum);
    case 4: return scatter_entries<4>(code, n, x, sum);
    case 8: return scatter_entries<8>(code, n, x, sum);
  }
  for (int64_t g = 0; g < n; g++)
    for (int d = 0; d < D; d++) sum[int64_t(code[g]) * D + d] += x[g * D + d];
}

void look_up(const uint8_t* code, int64_t stride, int64_t n, const float* tables, float* y) {
  for (int64_t o = 0; o < n; o++) y[o] += tables[code[o]] + tables[256 + code[stride + o]];
}

#if defined(__AVX512VBMI__)
// 64 look-ups in a table of 256 bytes: two permutes of 128 entries each, chosen by the code's top bit.
INLINE __m512i look_up_64(__m512i code, const void* table) {
  const __m512i* t = static_cast<const __m512i*>(table);
  __m512i first = _mm512_permutex2var_epi8(_mm512_loadu_si512(t), code, _mm512_loadu_si512(t + 1));
  __m512i second = _mm512_permutex2var_epi8(_mm512_loadu_si512(t + 2), code, _mm512_loadu_si512(t + 3));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), first, second);
}

// Low bytes (0..255) and high bytes (-128..127) are summed apart, two rows at a time: after interleaving the rows,
// one multiply-add by ones gives 16-bit sums of both. At most 64 pairs fit before those are added up in 32 bits.
// Interleaving permutes the outputs within each 16: `place` says where each ends up.
void look_up_bytes(const uint8_t* code, int64_t stride, int64_t n, int64_t pairs, const uint8_t* low, const int8_t* high,
                   float scale, float* y) {
  const __m512i ones = _mm512_set1_epi8(1);
  constexpr int BLOCK = 1024;  // outputs at a time: their sums stay in the nearest cache
  for (int64_t o = 0; o < n; o += BLOCK) {
    const int64_t width = n - o < BLOCK ? n - o : BLOCK;
    alignas(64) int16_t sums[2][2][BLOCK / 2];
    alignas(64) int32_t totals[2][BLOCK / 2];
    memset(totals, 0, sizeof totals);
    for (int64_t start = 0; start < pairs; start += 64) {
      const int64_t end = start + 64 < pairs ? start + 64 : pairs;
      memset(sums, 0, sizeof sums);
      for (int64_t p = start; p < end; p++) {
        const uint8_t *a = code + 2 * p * stride + o, *b = a + stride;
        for (int64_t i = 0; i < width; i += 64) {
          const __m512i ca = _mm512_loadu_si512(a + i), cb = _mm512_loadu_si512(b + i);
          const __m512i la = look_up_64(ca, low + 512 * p), lb = look_up_64(cb, low + 512 * p + 256);
          const __m512i ha = look_up_64(ca, high + 512 * p), hb = look_up_64(cb, high + 512 * p + 256);
          const __m512i part[2][2] = {{_mm512_maddubs_epi16(_mm512_unpacklo_epi8(la, lb), ones),
                                       _mm512_maddubs_epi16(_mm512_unpackhi_epi8(la, lb), ones)},
                                      {_mm512_maddubs_epi16(ones, _mm512_unpacklo_epi8(ha, hb)),
                                       _mm512_maddubs_epi16(ones, _mm512_unpackhi_epi8(ha, hb))}};
          for (int byte = 0; byte < 2; byte++)
            for (int half = 0; half < 2; half++) {
              int16_t* s = &sums[byte][half][i / 2];
              _mm512_store_si512(s, _mm512_add_epi16(_mm512_load_si512(s), part[byte][half]));
            }
        }
      }
      for (int half = 0; half < 2; half++)
        for (int i = 0; i < BLOCK / 2; i++) totals[half][i] += int32_t(sums[0][half][i]) + 256 * int32_t(sums[1][half][i]);
    }
    for (int64_t i = 0; i < width; i++) {
      const int half = i % 16 / 8;
      const int64_t place = i / 64 * 32 + i % 64 / 16 * 8 + i % 8;
      y[o + i] += scale * float(totals[half][place]);
    }
  }
}

float to_bytes(const float* x, int64_t n, uint8_t* low, int8_t* high) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  const float top = _mm512_reduce_max_ps(largest), scale = top > 1e-30f ? top / 32000 : 1;
  const __m512 factor = _mm512_set1_ps(1 / scale);
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(whole));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(_mm512_srai_epi32(whole, 8)));
  }
  return scale;
}
#else
constexpr auto look_up_bytes = nullptr;
constexpr auto to_bytes = nullptr;
#endif

extern const CodebookTiles codebook_table;
const CodebookTiles codebook_table = {NAME(CLUSCOMP_ISA), expand, add_multiple, add_fours, add_halves, scatter, look_up, look_up_bytes, to_bytes};

}  // namespace CLUSCOMP_ISA
