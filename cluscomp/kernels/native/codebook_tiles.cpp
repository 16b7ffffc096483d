// Compiled once per instruction set, with CLUSCOMP_ISA naming it.
#include "codebook_tiles.h"

#include "simd.h"

#define STRING(x) #x
#define NAME(x) STRING(x)

namespace CLUSCOMP_ISA {

#if defined(__AVX512BW__)
// Sixteen codes at a time out of 64 bytes: two neighbouring words to each lane, shifted to the code's own start.
INLINE int64_t read_sixteens(const uint8_t* packed, int64_t bytes, int bits, int64_t begin, int64_t n, int last, uint16_t* out) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i start = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(bits)), _mm512_set1_epi32(begin * bits & 7));
  const __m512i word = _mm512_srli_epi32(start, 4), shifts = _mm512_and_si512(start, _mm512_set1_epi32(15));
  const __m512i order = _mm512_or_si512(word, _mm512_slli_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(1)), 16));
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

// Entries of four numbers side by side in one register, as many as fit: one, two or four.
struct Fours {
  typedef vf Register;
  static constexpr int LANES = 4;

  INLINE vf entries(const uint16_t* code, const float* table) {
#if defined(__AVX2__)
    auto two = [&](int i) {
      const __m256 first = _mm256_castps128_ps256(_mm_loadu_ps(table + 4 * int64_t(code[i])));
      return _mm256_insertf128_ps(first, _mm_loadu_ps(table + 4 * int64_t(code[i + 1])), 1);
    };
#endif
#if defined(__AVX512F__)
    return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(two(0)), two(2), 1);
#elif defined(__AVX2__)
    return (vf)two(0);
#else
    vf one;
    memcpy(&one, table + 4 * int64_t(code[0]), 16);
    return one;
#endif
  }
#if defined(__AVX2__)
  INLINE vf entries(const uint16_t* code, const uint16_t* table) {
    auto two = [&](int i) {
      double first, second;
      memcpy(&first, table + 4 * int64_t(code[i]), 8), memcpy(&second, table + 4 * int64_t(code[i + 1]), 8);
      return _mm_castpd_si128(_mm_setr_pd(first, second));
    };
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_set_m128i(two(2), two(0)));
#else
    return (vf)_mm256_cvtph_ps(two(0));
#endif
  }
#endif
};

INLINE void expand_fours(const uint16_t* code, int64_t n, const float* table, float* out) {
  constexpr int N = W / 4;
  int64_t g = 0;
  for (; g + N <= n; g += N) {
    const vf some = Fours::entries(code + g, table);
    memcpy(out + 4 * g, &some, sizeof some);
  }
  expand_entries<4>(code + g, n - g, table, out + 4 * g);
}

typedef float v8 __attribute__((vector_size(32)));

// One entry of eight numbers.
struct Eights {
  typedef v8 Register;
  static constexpr int LANES = 8;

  INLINE v8 entries(const uint16_t* code, const float* table) {
    v8 one;
    memcpy(&one, table + 8 * int64_t(code[0]), 32);
    return one;
  }
#if defined(__AVX2__)
  INLINE v8 entries(const uint16_t* code, const uint16_t* table) {
    return (v8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 8 * int64_t(code[0]))));
  }
#endif
};

#if defined(__AVX512F__)
INLINE v8 fma(v8 a, v8 b, v8 c) { return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif !defined(__AVX2__)
INLINE v8 fma(v8 a, v8 b, v8 c) {
  for (int d = 0; d < 8; d++) c[d] = fma(a[d], b[d], c[d]);
  return c;
}
#endif

// ---- numbers of 16 bits ----

INLINE float of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
INLINE uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
INLINE float widened(float v) { return v; }
#if defined(__AVX2__)
INLINE float widened(uint16_t half) { return _cvtsh_ss(half); }
INLINE uint16_t narrowed(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
INLINE float widened(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 31) return of_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return of_bits(sign | bits_of(float(fraction) * 5.9604644775390625e-8f));  // 2^-24
  return of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}
INLINE uint16_t narrowed(float f) {
  const uint32_t sign = bits_of(f) >> 16 & 0x8000, size = bits_of(f) & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);                                    // not a number
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);                                   // 65520 and more
  if (size < 0x38800000) return uint16_t(sign | (bits_of(of_bits(size) + 0.5f) & 0x7fff));  // below 2^-14: 0.5's last bit is 2^-24
  return uint16_t(sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13);
}
#endif

void widen(bool brain, const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  if (brain) {
    for (; i < n; i++) to[i] = of_bits(uint32_t(from[i]) << 16);
    return;
  }
#if defined(__AVX2__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; i++) to[i] = widened(from[i]);
}

void narrow(bool brain, const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  if (brain) {
    for (; i < n; i++) {
      const uint32_t bits = bits_of(from[i]);
      const bool number = (bits & 0x7fffffff) <= 0x7f800000;
      to[i] = number ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
    }
    return;
  }
#if defined(__AVX2__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; i++) to[i] = narrowed(from[i]);
}

// W numbers of 16 bits as floats.
template <bool BRAIN>
INLINE vf widened_register(const uint16_t* from) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return BRAIN ? (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16) : (vf)_mm512_cvtph_ps(bits);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return BRAIN ? (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16) : (vf)_mm256_cvtph_ps(bits);
#else
  vf r;
  for (int i = 0; i < W; i++) r[i] = BRAIN ? of_bits(uint32_t(from[i]) << 16) : widened(from[i]);
  return r;
#endif
}

// Rows b ... b + B - 1 of x and o ... o + O - 1 of the weight: a sum of sixteen lanes each, then of what is left.
template <bool BRAIN, int B, int O>
INLINE void multiply_some(const uint16_t* weight, int64_t I, const float* x, float* y, int64_t y_stride) {
  F sums[B][O];
  for (int b = 0; b < B; b++)
    for (int o = 0; o < O; o++) sums[b][o] = all(0);
  int64_t i = 0;
  for (; i + 16 <= I; i += 16)
    for (int o = 0; o < O; o++)
      for (int p = 0; p < P; p++) {
        const vf w = widened_register<BRAIN>(weight + o * I + i + p * W);
        for (int b = 0; b < B; b++) {
          vf some;
          memcpy(&some, x + b * I + i + p * W, sizeof some);
          sums[b][o].p[p] = fma(some, w, sums[b][o].p[p]);
        }
      }
  for (int b = 0; b < B; b++)
    for (int o = 0; o < O; o++) {
      float lanes[16];
      store(lanes, sums[b][o]);
      for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
      for (int64_t j = i; j < I; j++) {
        const uint16_t w = weight[o * I + j];
        lanes[0] = fma(x[b * I + j], BRAIN ? of_bits(uint32_t(w) << 16) : widened(w), lanes[0]);
      }
      y[b * y_stride + o] = lanes[0];
    }
}

// Eight sums at a time keep the multipliers busy.
template <bool BRAIN, int B>
INLINE void multiply_rows(const uint16_t* weight, int64_t O, int64_t I, const float* x, float* y, int64_t y_stride) {
  int64_t o = 0;
  for (; o + 8 / B <= O; o += 8 / B) multiply_some<BRAIN, B, 8 / B>(weight + o * I, I, x, y + o, y_stride);
  for (; o < O; o++) multiply_some<BRAIN, B, 1>(weight + o * I, I, x, y + o, y_stride);
}

template <bool BRAIN>
INLINE void multiply_all(const uint16_t* weight, int64_t O, int64_t I, const float* x, int64_t B, float* y, int64_t y_stride) {
  int64_t b = 0;
  for (; b + 8 <= B; b += 8) multiply_rows<BRAIN, 8>(weight, O, I, x + b * I, y + b * y_stride, y_stride);
  for (; b + 4 <= B; b += 4) multiply_rows<BRAIN, 4>(weight, O, I, x + b * I, y + b * y_stride, y_stride);
  for (; b + 2 <= B; b += 2) multiply_rows<BRAIN, 2>(weight, O, I, x + b * I, y + b * y_stride, y_stride);
  for (; b < B; b++) multiply_rows<BRAIN, 1>(weight, O, I, x + b * I, y + b * y_stride, y_stride);
}

void multiply_halves(bool brain, const uint16_t* weight_OI, int64_t O, int64_t I, const float* x_BI, int64_t B, float* y, int64_t y_stride) {
  (brain ? multiply_all<true> : multiply_all<false>)(weight_OI, O, I, x_BI, B, y, y_stride);
}

// ---- products straight from codes ----

// B rows of x meet INPUTS inputs: the sums of a register's entries stay in registers meanwhile.
template <typename E, int B, int INPUTS, typename T>
INLINE void add_some(const Sums& s, int64_t b, int64_t i, const T* table) {
  typedef typename E::Register V;
  constexpr int LANES = E::LANES, N = sizeof(V) / 4 / LANES, FEW = B * INPUTS <= 16 ? B * INPUTS : 1;
  const float* x = s.x + b * s.x_stride + i;
  const int64_t x_stride = s.x_stride, y_stride = s.y_stride, stride = s.code_stride, n = s.n, bits = s.bits, eight = s.eight_inputs;
  const uint16_t* code = s.code + i * stride;
  float* y = s.y + b * y_stride;
  V few[FEW];  // of few numbers of x all stay in registers
  for (int k = 0; k < FEW && FEW > 1; k++) few[k] = x[k / INPUTS * x_stride + k % INPUTS] - V{};
  int64_t g = 0, step = 0;
  for (; g + N <= n; g += N, step++) {
    for (int j = 0; j + 8 <= INPUTS; j += 8) __builtin_prefetch(s.soon[step & 7] + (i + j) / 8 * eight + (step >> 3) * N * bits);
    V sum[B];
    for (int r = 0; r < B; r++) memcpy(&sum[r], y + r * y_stride + g * LANES, sizeof(V));
    for (int j = 0; j < INPUTS; j++) {
      const V e = E::entries(code + j * stride + g, table);
      for (int r = 0; r < B; r++) sum[r] = fma(FEW > 1 ? few[r * INPUTS + j] : x[r * x_stride + j] - V{}, e, sum[r]);
    }
    for (int r = 0; r < B; r++) memcpy(y + r * y_stride + g * LANES, &sum[r], sizeof(V));
  }
  for (; g < n; g++)
    for (int r = 0; r < B; r++)
      for (int j = 0; j < INPUTS; j++)
        for (int d = 0; d < LANES; d++) {
          float& sum = y[r * y_stride + g * LANES + d];
          sum = fma(x[r * x_stride + j], widened(table[LANES * int64_t(code[j * stride + g]) + d]), sum);
        }
}

template <typename E, int B, typename T>
INLINE void add_inputs(const Sums& s, int64_t b, const T* table) {
  constexpr int MANY = B < 4 ? 8 : 32;  // sums are loaded and stored less often
  int64_t i = 0;
  for (; i + MANY <= s.inputs; i += MANY) add_some<E, B, MANY>(s, b, i, table);
  for (; i + 8 <= s.inputs; i += 8) add_some<E, B, 8>(s, b, i, table);
  for (; i < s.inputs; i++) add_some<E, B, 1>(s, b, i, table);
}

template <typename E, typename T>
INLINE void add_all(const Sums& s, const T* table) {
  int64_t b = 0;
  for (; b + 8 <= s.B; b += 8) add_inputs<E, 8>(s, b, table);
  for (; b + 4 <= s.B; b += 4) add_inputs<E, 4>(s, b, table);
  for (; b + 2 <= s.B; b += 2) add_inputs<E, 2>(s, b, table);
  for (; b < s.B; b++) add_inputs<E, 1>(s, b, table);
}
void add_fours(const Sums& s, const float* table) { add_all<Fours>(s, table); }
void add_eights(const Sums& s, const float* table) { add_all<Eights>(s, table); }
#if defined(__AVX2__)
void add_four_halves(const Sums& s, const uint16_t* table) { add_all<Fours>(s, table); }
void add_eight_halves(const Sums& s, const uint16_t* table) { add_all<Eights>(s, table); }
#else
constexpr auto add_four_halves = nullptr, add_eight_halves = nullptr;
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
const CodebookTiles codebook_table = {NAME(CLUSCOMP_ISA), read,   expand,   add_rows, add_fours, add_four_halves, add_eights, add_eight_halves,
                                      widen, narrow, multiply_halves, scatter, tabulate, look_up};

}  // namespace CLUSCOMP_ISA
