// The inner loops of codebook layers, compiled once per instruction set. Plain pointers only: see simd.h for why.
#pragma once
#include <stdint.h>

// B rows of x, of `inputs` numbers each, meet as many rows of n codes; their sums are B rows of n entries.
struct Sums {
  int64_t B, inputs, n;
  const float* x;
  int64_t x_stride;
  const uint16_t* code;
  int64_t code_stride;
  float* y;
  int64_t y_stride;
  const uint8_t* soon[8];  // where the packed codes of the next 8 inputs lie: they are asked for meanwhile
  int64_t bits, eight_inputs;  // of a code; bytes from an input's packed codes to those of the eighth after it
};

struct CodebookTiles {
  const char* name;
  // Codes begin ... begin + n - 1 of a packed stream of `bytes` bytes; a code beyond `last` is read as `last`.
  void (*read)(const uint8_t* packed, int64_t bytes, int bits, int64_t begin, int64_t n, int last, uint16_t* out);
  // out[g * D + d] = table[code[g] * D + d] for n codes. Unless D is 2, 4 or 8 it reads up to 16 floats from every
  // entry and writes up to 16 floats beyond the end: table and out need that slack.
  void (*expand)(const uint16_t* code, int64_t n, const float* table, int D, float* out);
  // y[i] += a[0] * x[i] + a[1] * x[stride + i] + ... of some rows of n floats, one row after the other.
  void (*add_rows)(const float* a, int64_t rows, const float* x, int64_t stride, float* y, int64_t n);
  // y[LANES g + d] += x[0] * table[LANES * code[g] + d] + x[1] * table[LANES * code[code_stride + g] + d] + ... for each
  // row of x, in this order; LANES is 4 or 8. And the same from a table of float16 bits (null where the machine lacks
  // AVX2), which is half as large and so nearer to the processor.
  void (*add_fours)(const Sums&, const float* table);
  void (*add_four_halves)(const Sums&, const uint16_t* table);
  void (*add_eights)(const Sums&, const float* table);
  void (*add_eight_halves)(const Sums&, const uint16_t* table);
  // n numbers of 16 bits (bfloat16 or float16) as floats, and floats rounded to the nearest such numbers.
  void (*widen)(bool brain, const uint16_t* from, int64_t n, float* to);
  void (*narrow)(bool brain, const float* from, int64_t n, uint16_t* to);
  // y[b * y_stride + o] = the product of row b of x (B rows) and row o of the weight (O rows), of I numbers each; every
  // sum has the same order whatever B and O are.
  void (*multiply_halves)(bool brain, const uint16_t* weight_OI, int64_t O, int64_t I, const float* x_BI, int64_t B, float* y, int64_t y_stride);
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
