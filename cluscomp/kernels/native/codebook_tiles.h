// The inner loops of codebook layers, compiled once per instruction set. Plain pointers only: see simd.h for why.
#pragma once
#include <stdint.h>

struct CodebookTiles {
  const char* name;
  // out[g * D + d] = table[code[g] * D + d] for n codes. Reads up to 16 floats from every entry and writes up to 16
  // floats beyond the end: table and out need that slack.
  void (*expand)(const uint16_t* code, int64_t n, const float* table, int D, float* out);
  // y[i] += a * x[i] for n floats.
  void (*add_multiple)(float a, const float* x, float* y, int64_t n);
  // y[4 g + d] += a * table[4 * code[g] + d] for n codes; and the same from a table of float16 bits (null where the
  // machine lacks AVX-512), which is half as large and so nearer to the processor.
  void (*add_fours)(float a, const uint16_t* code, int64_t n, const float* table, float* y);
  void (*add_halves)(float a, const uint16_t* code, int64_t n, const uint16_t* table, float* y);
  // sum[code[g] * D + d] += x[g * D + d] for n codes.
  void (*scatter)(const uint16_t* code, int64_t n, const float* x, int D, float* sum);
  // y[o] += table[0][code[o]] + ... for two rows of n byte codes (stride apart) and two tables of 256 floats.
  void (*look_up)(const uint8_t* code, int64_t stride, int64_t n, const float* tables, float* y);
  // The same in whole numbers of 16 bits, for `pairs` pairs of rows, adding scale * sum to y; null where the machine
  // lacks byte permutes (AVX-512 VBMI). low, high: the bytes of the tables, 256 each per row. n a multiple of 64.
  void (*look_up_bytes)(const uint8_t* code, int64_t stride, int64_t n, int64_t pairs, const uint8_t* low, const int8_t* high,
                        float scale, float* y);
  // x[i] = scale * (low[i] + 256 * high[i]), rounded, for n floats (a multiple of 16); returns the scale. Or null.
  float (*to_bytes)(const float* x, int64_t n, uint8_t* low, int8_t* high);
};

const CodebookTiles& codebook_tiles();
const CodebookTiles* codebook_tiles_named(const char* name);
