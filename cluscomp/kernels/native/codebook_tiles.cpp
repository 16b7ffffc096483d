// Compiled once per instruction set, with CLUSCOMP_ISA naming it.
#include "codebook_tiles.h"

#include "simd.h"

#define STRING(x) #x
#define NAME(x) STRING(x)

namespace CLUSCOMP_ISA {

#if defined(__AVX512BW__)
// Sixteen codes at a time out of 64 bytes: two neighbouring words to each lane, shifted to the code's own start.
INLINE int64_t read_sixteens(const uint8_t* packed, int64_t bytes, int bits, int64_t begin, int64_t n, int last, uint16_t* out) {
  const int skip = int(begin * bits & 7);
  alignas(64) uint16_t from[32];
  alignas(64) int32_t shift[16];
  for (int j = 0; j < 16; j++) {
    for (int i = 0; i < 2; i++) from[2 * j + i] = uint16_t(((skip + j * bits) >> 4) + i);
    shift[j] = (skip + j * bits) & 15;
  }
  const __m512i order = _mm512_load_si512(from), shifts = _mm512_load_si512(shift);
  const __m512i mask = _mm512_set1_epi32((1 << bits) - 1), most = _mm512_set1_epi32(last);
  int64_t i = 0;
  for (int64_t byte = begin * bits >> 3; i + 16 <= n && byte + 64 <= bytes; i += 16, byte += 2 * bits) {
    const __m512i window = _mm512_srlv_epi32(_mm512_permutexvar_epi16(order, _mm512_loadu_si512(packed + byte)), shifts);
    const __m512i code = _mm512_min_epi32(_mm512_and_si512(window, mask), most);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtepi32_epi16(code));
  }
  return i;
}
#else
INLINE int64_t read_sixteens(const uint8_t*, int64_t, int, int64_t, int64_t, int, uint16_t*) { return 0; }
#endif

void read(const uint8_t* packed, int64_t bytes, int bits, int64_t begin, int64_t n, int last, uint16_t* out) {
  const uint64_t mask = (uint64_t(1) << bits) - 1;
  int64_t i = 0;
  if (bits == 8) {
    for (; i < n; i++) out[i] = packed[begin + i];
  } else if (bits == 16) {
    memcpy(out, packed + 2 * begin, 2 * n);
    i = n;
  } else {
    i = read_sixteens(packed, bytes, bits, begin, n, last, out);
  }
  // What is left: four codes at a time out of 64 bits, as long as eight bytes may be read, and then one by one.
  for (; i + 4 <= n; i += 4) {
    const int64_t bit = (begin + i) * bits, byte = bit >> 3;
    if (bits > 14 || byte + 8 > bytes) break;  // 4 * 14 + 7 = 63 bits
    uint64_t window;
    memcpy(&window, packed + byte, 8);
    window >>= bit & 7;
    for (int j = 0; j < 4; j++) out[i + j] = uint16_t(window >> j * bits & mask);
  }
  for (; i < n; i++) {
    const int64_t bit = (begin + i) * bits, byte = bit >> 3;
    uint32_t window = 0;
    memcpy(&window, packed + byte, bytes - byte < 4 ? bytes - byte : 4);
    out[i] = uint16_t(window >> (bit & 7) & mask);
  }
  const uint16_t most = uint16_t(last);
  if (most < mask)
    for (i = 0; i < n; i++) out[i] = out[i] < most ? out[i] : most;
}

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
  auto pair = [&](int i) {
    double first, second;
    memcpy(&first, table + 4 * int64_t(code[i]), 8), memcpy(&second, table + 4 * int64_t(code[i + 1]), 8);
    return _mm_setr_pd(first, second);
  };
  return _mm512_cvtph_ps(_mm256_castpd_si256(_mm256_set_m128d(pair(2), pair(0))));
}
#elif defined(__AVX2__)
// Two entries of four floats make one register.
INLINE __m256 two_entries(const uint16_t* code, const float* table) {
  const __m256 first = _mm256_castps128_ps256(_mm_loadu_ps(table + 4 * int64_t(code[0])));
  return _mm256_insertf128_ps(first, _mm_loadu_ps(table + 4 * int64_t(code[1])), 1);
}
INLINE __m256 two_entries(const uint16_t* code, const uint16_t* table) {
  double first, second;
  memcpy(&first, table + 4 * int64_t(code[0]), 8), memcpy(&second, table + 4 * int64_t(code[1]), 8);
  return _mm256_cvtph_ps(_mm_castpd_si128(_mm_setr_pd(first, second)));
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
#if defined(__AVX2__)
  return _mm256_cvtss_f32(_mm256_cvtph_ps(_mm_set1_epi16(v)));
#else
  return v;  // never used: add_halves is null here
#endif
}

template <int ROWS, typename T>
INLINE void add_entries(const float* a, const uint16_t* code, int64_t stride, int64_t n, const T* table, float* y) {
  int64_t g = 0;
#if defined(__AVX512F__)
  for (; g + 4 <= n; g += 4) {
    __m512 sum = _mm512_loadu_ps(y + 4 * g);
    for (int r = 0; r < ROWS; r++) sum = _mm512_fmadd_ps(_mm512_set1_ps(a[r]), four_entries(code + r * stride + g, table), sum);
    _mm512_storeu_ps(y + 4 * g, sum);
  }
#elif defined(__AVX2__)
  for (; g + 2 <= n; g += 2) {
    __m256 sum = _mm256_loadu_ps(y + 4 * g);
    for (int r = 0; r < ROWS; r++) sum = _mm256_fmadd_ps(_mm256_set1_ps(a[r]), two_entries(code + r * stride + g, table), sum);
    _mm256_storeu_ps(y + 4 * g, sum);
  }
#endif
  for (; g < n; g++)
    for (int r = 0; r < ROWS; r++)
      for (int d = 0; d < 4; d++) y[4 * g + d] = fma(a[r], widened(table[4 * int64_t(code[r * stride + g]) + d]), y[4 * g + d]);
}
template <typename T>
INLINE void add_all_entries(const float* a, int64_t rows, const uint16_t* code, int64_t stride, int64_t n, const T* table, float* y) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) add_entries<8>(a + r, code + r * stride, stride, n, table, y);  // y is loaded and stored less often
  for (; r < rows; r++) add_entries<1>(a + r, code + r * stride, stride, n, table, y);
}
void add_fours(const float* a, int64_t rows, const uint16_t* code, int64_t stride, int64_t n, const float* table, float* y) {
  add_all_entries(a, rows, code, stride, n, table, y);
}
#if defined(__AVX2__)
void add_halves(const float* a, int64_t rows, const uint16_t* code, int64_t stride, int64_t n, const uint16_t* table, float* y) {
  add_all_entries(a, rows, code, stride, n, table, y);
}
#else
constexpr auto add_halves = nullptr;
#endif

typedef float v8 __attribute__((vector_size(32)));
INLINE v8 fma(float a, v8 b, v8 c) {
#if defined(__AVX2__)
  return (v8)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
#else
  for (int d = 0; d < 8; d++) c[d] = fma(a, b[d], c[d]);
  return c;
#endif
}

INLINE v8 eight(const float* entry) {
  v8 e;
  memcpy(&e, entry, 32);
  return e;
}
#if defined(__AVX2__)
INLINE v8 eight(const uint16_t* entry) { return (v8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entry))); }
#endif

template <int ROWS, typename T>
INLINE void add_some_eights(const float* a, const uint16_t* code, int64_t stride, int64_t n, const T* table, int D, float* y) {
  for (int64_t g = 0; g < n; g++) {
    v8 sum = eight(y + 8 * g);
    for (int r = 0; r < ROWS; r++) sum = fma(a[r], eight(table + int64_t(code[r * stride + g]) * D), sum);
    memcpy(y + 8 * g, &sum, 32);
  }
}
template <typename T>
INLINE void add_all_eights(const float* a, int64_t rows, const uint16_t* code, int64_t stride, int64_t n, const T* table, int D,
                           float* y) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) add_some_eights<8>(a + r, code + r * stride, stride, n, table, D, y);
  for (; r < rows; r++) add_some_eights<1>(a + r, code + r * stride, stride, n, table, D, y);
}
void add_eights(const float* a, int64_t rows, const uint16_t* code, int64_t stride, int64_t n, const float* table, int D, float* y) {
  add_all_eights(a, rows, code, stride, n, table, D, y);
}
#if defined(__AVX2__)
void add_eight_halves(const float* a, int64_t rows, const uint16_t* code, int64_t stride, int64_t n, const uint16_t* table, int D,
                      float* y) {
  add_all_eights(a, rows, code, stride, n, table, D, y);
}
#else
constexpr auto add_eight_halves = nullptr;
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

template <int ROWS>
INLINE void add_some_rows(const float* a, const float* x, int64_t stride, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    F sum = load(y + i);
    for (int r = 0; r < ROWS; r++) sum = fma(all(a[r]), load(x + r * stride + i), sum);
    store(y + i, sum);
  }
  for (; i < n; i++)
    for (int r = 0; r < ROWS; r++) y[i] = fma(a[r], x[r * stride + i], y[i]);
}

void add_rows(const float* a, int64_t rows, const float* x, int64_t stride, float* y, int64_t n) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) add_some_rows<4>(a + r, x + r * stride, stride, y, n);
  for (; r < rows; r++) add_some_rows<1>(a + r, x + r * stride, stride, y, n);
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

// The products of one row of x with 16 centroids.
INLINE F sixteen_products(const float* by_axis, const float* x, int D) {
  F sum = all(x[0]) * load(by_axis);
  for (int d = 1; d < D; d++) sum = fma(all(x[d]), load(by_axis + 256 * d), sum);
  return sum;
}

#if defined(__AVX512VBMI__)
// 64 look-ups in a table of 256 bytes: two permutes of 128 entries each, chosen by the code's top bit.
INLINE __m512i look_up_64(__m512i code, const uint8_t* table) {
  const __m512i* t = reinterpret_cast<const __m512i*>(table);
  __m512i first = _mm512_permutex2var_epi8(_mm512_loadu_si512(t), code, _mm512_loadu_si512(t + 1));
  __m512i second = _mm512_permutex2var_epi8(_mm512_loadu_si512(t + 2), code, _mm512_loadu_si512(t + 3));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), first, second);
}

constexpr int BLOCK = 2048;  // outputs at a time: their sums stay in the nearest cache
constexpr int AHEAD = 8;     // rows between that of the codes in use and that asked for meanwhile

// The codes of outputs i ... i + 63 of `width`; 0 beyond. Those AHEAD rows on come into the second cache: the nearest
// one is full of sums and tables.
INLINE __m512i codes_64(const uint8_t* code, int64_t i, int64_t width, int64_t stride) {
  __builtin_prefetch(code + i + AHEAD * stride, 0, 2);
  const __mmask64 there = width - i < 64 ? (uint64_t(1) << (width - i)) - 1 : ~uint64_t(0);
  return _mm512_maskz_loadu_epi8(there, code + i);
}

// The floats' first bytes, second bytes, third and fourth: four tables of 256 bytes.
void tabulate(const float* by_axis, const float* x_GD, int64_t G, int D, uint8_t* tables) {
  const __m512i by_byte = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  const __m512i together = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t g = 0; g < G; g++)
    for (int k = 0; k < 256; k += 16) {
      const __m512i product = (__m512i)sixteen_products(by_axis + k, x_GD + g * D, D).p[0];
      const __m512i bytes = _mm512_permutexvar_epi32(together, _mm512_shuffle_epi8(product, by_byte));
      alignas(64) uint8_t apart[4][16];
      _mm512_store_si512(apart, bytes);
      for (int b = 0; b < 4; b++) memcpy(tables + 1024 * g + 256 * b + k, apart[b], 16);
    }
}

// Interleaving the four bytes again permutes the outputs within each 64: `place` says where each ends up.
void look_up(const uint8_t* code, int64_t stride, int64_t n, int64_t G, const uint8_t* tables, float* y) {
  for (int64_t o = 0; o < n; o += BLOCK) {
    const int64_t width = n - o < BLOCK ? n - o : BLOCK;
    alignas(64) float sums[BLOCK];
    memset(sums, 0, sizeof sums);
    for (int64_t g = 0; g < G; g++)
      for (int64_t i = 0; i < width; i += 64) {
        const __m512i c = codes_64(code + g * stride + o, i, width, stride);
        const uint8_t* t = tables + 1024 * g;
        const __m512i b0 = look_up_64(c, t), b1 = look_up_64(c, t + 256), b2 = look_up_64(c, t + 512), b3 = look_up_64(c, t + 768);
        const __m512i low[2] = {_mm512_unpacklo_epi8(b0, b1), _mm512_unpackhi_epi8(b0, b1)};
        const __m512i high[2] = {_mm512_unpacklo_epi8(b2, b3), _mm512_unpackhi_epi8(b2, b3)};
        for (int half = 0; half < 2; half++) {
          float* s = sums + i + 32 * half;
          const __m512 first = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low[half], high[half]));
          const __m512 second = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low[half], high[half]));
          _mm512_store_ps(s, _mm512_add_ps(_mm512_load_ps(s), first));
          _mm512_store_ps(s + 16, _mm512_add_ps(_mm512_load_ps(s + 16), second));
        }
      }
    for (int64_t i = 0; i < width; i++) {
      const int64_t place = i / 64 * 64 + i % 16 / 4 * 16 + i % 64 / 16 * 4 + i % 4;
      y[o + i] = sums[place];
    }
  }
}
#else
void tabulate(const float* by_axis, const float* x_GD, int64_t G, int D, uint8_t* tables) {
  for (int64_t g = 0; g < G; g++)
    for (int k = 0; k < 256; k += 16) {
      const F product = sixteen_products(by_axis + k, x_GD + g * D, D);
      memcpy(tables + 1024 * g + 4 * k, &product, 64);
    }
}

void look_up(const uint8_t* code, int64_t stride, int64_t n, int64_t G, const uint8_t* tables, float* y) {
  memset(y, 0, 4 * n);
  for (int64_t g = 0; g < G; g++)
    for (int64_t o = 0; o < n; o++) {
      float product;
      memcpy(&product, tables + 1024 * g + 4 * int64_t(code[g * stride + o]), 4);
      y[o] += product;
    }
}
#endif

extern const CodebookTiles codebook_table;
const CodebookTiles codebook_table = {NAME(CLUSCOMP_ISA), read, expand, add_rows, add_fours, add_halves, add_eights, add_eight_halves, scatter,
                                      tabulate, look_up};

}  // namespace CLUSCOMP_ISA
