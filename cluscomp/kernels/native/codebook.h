// Codebook layers: weights stored as packed codes and a table of centroids.
//
// Codes are a little-endian bit stream: code i fills bits [i * bits, (i + 1) * bits), padded with zeros to a multiple
// of 8 codes. Axis "out": the codes are a matrix (I, ceil(O / D)) in rows, one code being D neighbouring outputs of
// one input. Axis "in": (ceil(I / D), O), one code being D neighbouring inputs of one output.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "codebook_tiles.h"
#include "threads.h"

struct Codes {
  const uint8_t* packed;
  int bits;
  int64_t count;
  int K;  // a code beyond K - 1 is read as K - 1: no stream of bits leads outside of the codebook
  // Codes begin ... begin + n - 1 as 16-bit numbers.
  void read(const CodebookTiles& tile, int64_t begin, int64_t n, uint16_t* out) const {
    tile.read(packed, (count + 7) / 8 * bits, bits, begin, n, K - 1, out);
  }
};

void pack(const int32_t* codes, int64_t n, int bits, uint8_t* packed);

// weight_IO (I rows of O floats) of axis "out".
void decode(const Codes&, const float* table_KD, int D, int64_t I, int64_t O, float* weight_IO, const CodebookTiles&, const Workers&);
// y_BO = x_BI @ weight_IO without the weight, axis "out". halves_KD: the same table as float16 bits, or null; where
// it is given (see `takes_halves`), table_KD is not looked at.
bool takes_halves(int64_t D, const CodebookTiles&);
void multiply(const Codes&, const float* table_KD, const uint16_t* halves_KD, int D, int64_t B, int64_t I, int64_t O, const float* x_BI, float* y_BO,
              const CodebookTiles&, const Workers&);
// y_O = weight_OI @ x_I, axis "in", 8-bit codes: x's products with all centroids are tabled, then looked up.
void multiply_by_tables(const Codes&, const float* table_KD, int D, int64_t I, int64_t O, const float* x_I, float* y_O,
                        const CodebookTiles&, const Workers&);
// gradient_KD[k] = sum of grad_IO over the places of code k, axis "out".
void gradient(const Codes&, int D, int64_t I, int64_t O, const float* grad_IO, float* gradient_KD, const CodebookTiles&, const Workers&);
