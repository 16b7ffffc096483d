// Rows rounded to whole numbers one after the other, each row's error handed on to the rows to come.
#pragma once
#include <cmath>
#include <cstdint>

// The float's leading 11 bits (Veltkamp's splitting), which a 16-bit float holds.
inline float leading_bits(float x) {
  const float spread = x * 8193.0f;
  return spread - (spread - x);
}

// The error of row i, of which `error` holds the numbers: divided by factor[i, i], and taken from the rows to come.
inline void hand_on(int64_t i, int64_t rounds, int64_t outputs, float* wanted, const float* factor, float scale, float* error) {
  const float *row = wanted + i * outputs, *across = factor + i * rounds;
  for (int64_t o = 0; o < outputs; ++o) error[o] = (row[o] - error[o] * scale) / across[i];
  for (int64_t j = i + 1; j < rounds; ++j) {
    float* later = wanted + j * outputs;
    for (int64_t o = 0; o < outputs; ++o) later[o] -= across[j] * error[o];
  }
}

// Row i: numbers[i] = wanted[i] / step, rounded, at most 127 in size (the step is made larger for that);
// scales[i] fits the row best for these numbers; errors[i] = (wanted[i] - numbers[i] scales[i]) / factor[i, i]; then
// wanted[j] -= factor[i, j] errors[i] for j > i. Every product and difference is rounded by itself, the sums for scales
// are of double precision and of their quotient 11 bits are taken.
inline void round_rows(int64_t rounds, int64_t outputs, float* wanted, const float* factor, const float* steps,
                       int8_t* numbers, float* scales, float* errors) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, a half to an even one
  for (int64_t i = 0; i < rounds; ++i) {
    const float* row = wanted + i * outputs;
    float *error = errors + i * outputs, largest = 0;
    double product = 0, size = 0;
    for (int64_t o = 0; o < outputs; ++o) largest = std::fabs(row[o]) > largest ? std::fabs(row[o]) : largest;
    const float step = largest / 127 > steps[i] ? largest / 127 : steps[i];
    for (int64_t o = 0; o < outputs; ++o) {
      float number = (row[o] / step + magic) - magic;
      number = number > -127.0f ? number : -127.0f;  // so that what is no number becomes one
      number = number < 127.0f ? number : 127.0f;
      error[o] = number;
      numbers[i * outputs + o] = int8_t(number);
    }
    for (int64_t o = 0; o < outputs; ++o) product += double(error[o]) * row[o], size += double(error[o]) * error[o];
    const float scale = scales[i] = size > 0 ? leading_bits(float(product / size)) : step;
    hand_on(i, rounds, outputs, wanted, factor, scale, error);
  }
}
