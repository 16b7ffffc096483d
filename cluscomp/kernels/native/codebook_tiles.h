// The inner loops of codebook layers, compiled once per instruction set. Plain pointers only: see simd.h for why.
#pragma once
#include <stdint.h>

struct CodebookTiles {
  const char* name;
  // Codes begin ... begin + n - 1 of a packed stream of `bytes` bytes; a code beyond `last` is read as `last`.
  void (*read)(const uint8_t* packed, int64_t bytes, int bits, int64_t begin, int64_t n, int last, uint16_t* out);
  // out[g * D + d] = table[code[g] * D + d] for n codes. Unless D is 2, 4 or 8 it reads up to 16 floats from every
  // entry and writes up to 16 floats beyond the end: table and out need that slack.
  void (*expand)(const uint16_t* code, int64_t n, const float* table, int D, float* out);
  // y[i] += a[0] * x[i] + a[1] * x[stride + i] + ... of some rows of n floats, one row after the other.
  void (*add_rows)(const float* a, int64_t rows, const float* x, int64_t stride, float* y, int64_t n);
  // y[4 g + d] += a[0] * table[4 * code[g] + d] + a[1] * table[4 * code[stride + g] + d] + ... of some rows of n codes;
  // and the same from a table of float16 bits (null where the machine lacks AVX-512), which is half as large and so nearer
  // to the processor.
  void (*add_fours)(const float* a, int64_t rows, const uint16_t* code, int64_t stride, int64_t n, const float* table, float* y);
  void (*add_halves)(const float* a, int64_t rows, const uint16_t* code, int64_t stride, int64_t n, const uint16_t* table,
                     float* y);
  // y[8 g + d] += a[0] * table[D * code[g] + d] + a[1] * table[D * code[stride + g] + d] + ... of D up to 8; all eight of
  // each are written, and eight numbers read from every entry: the table needs that slack. And the same from a table of
  // float16 bits (null where there is no add_halves).
  void (*add_eights)(const float* a, int64_t rows, const uint16_t* code, int64_t stride, int64_t n, const float* table, int D,
                     float* y);
  void (*add_eight_halves)(const float* a, int64_t rows, const uint16_t* code, int64_t stride, int64_t n, const uint16_t* table,
                           int D, float* y);
  // sum[code[g] * D + d] += x[g * D + d] for n codes.
  void (*scatter)(const uint16_t* code, int64_t n, const float* x, int D, float* sum);
  // The products of each of G rows of x_GD with 256 centroids (by_axis: D rows of 256), as `look_up` wants them: 1024
  // bytes a row.
  void (*tabulate)(const float* by_axis, const float* x_GD, int64_t G, int D, uint8_t* tables);
  // y[o] = the sum over G rows of the row's product with centroid code[g * stride + o], for n outputs.
  void (*look_up)(const uint8_t* code, int64_t stride, int64_t n, int64_t G, const uint8_t* tables, float* y);
};

const CodebookTiles& codebook_tiles();
const CodebookTiles* codebook_tiles_named(const char* name);
