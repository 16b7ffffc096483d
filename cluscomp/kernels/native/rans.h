// Whole numbers of one byte as range asymmetric numeral systems write them (rANS: Duda, arXiv 1311.2540), several
// states in turn on one stream of 16-bit words.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "dependent.h"

// The numbers are a matrix (inputs, outputs) in rows. Number (i, o) has the table rows[i] + columns[o], in which
// frequencies[value + 128] of 2^14 add up to 2^14. Number k belongs to lane k % lanes. States lie in [2^16, 2^32). Where
// numbers stand for levels (dependent.h), those of odd states have the second half of the tables.
struct Tables {
  static constexpr int bits = 14;
  static constexpr uint32_t whole = 1u << bits, least = 1u << 16;
  int64_t inputs, outputs, half;
  const uint8_t *rows, *columns;
  std::vector<uint16_t> frequency, start;  // 256 of each table

  Tables(int64_t I, int64_t O, const uint8_t* r, const uint8_t* c, const uint16_t* frequencies, int64_t number,
         bool dependent)
      : inputs(I), outputs(O), half(dependent ? number / 2 : 0), rows(r), columns(c), frequency(frequencies, frequencies + number * 256), start(number * 256) {
    for (int64_t t = 0; t < number; ++t) {
      uint32_t sum = 0;
      for (int s = 0; s < 256; ++s) start[t * 256 + s] = uint16_t(sum), sum += frequency[t * 256 + s];
      if (sum != whole) throw std::invalid_argument("the frequencies of a table must add up to 2^14");
    }
    int highest = 0, widest = 0;
    for (int64_t i = 0; i < I; ++i) highest = rows[i] > highest ? rows[i] : highest;
    for (int64_t o = 0; o < O; ++o) widest = columns[o] > widest ? columns[o] : widest;
    if (highest + widest >= (dependent ? half : number)) throw std::invalid_argument("a number points past the tables");
  }
};

// Writes the numbers from the last to the first; returns how many words, in the order they are read. A number that its
// table does not have is refused.
inline int64_t rans_encode(const Tables& t, const int8_t* numbers, const uint8_t* odd, uint32_t* states, int64_t lanes, uint16_t* words) {
  for (int64_t lane = 0; lane < lanes; ++lane) states[lane] = Tables::least;
  int64_t written = 0;
  for (int64_t i = t.inputs - 1; i >= 0; --i)
    for (int64_t o = t.outputs - 1; o >= 0; --o) {
      const int64_t k = i * t.outputs + o;
      const int64_t table = t.rows[i] + t.columns[o] + (odd && odd[k] ? t.half : 0), symbol = table * 256 + numbers[k] + 128;
      const uint32_t f = t.frequency[symbol];
      if (f == 0) throw std::invalid_argument("a number that its table does not have");
      uint32_t& state = states[k % lanes];
      if (uint64_t(state) >= uint64_t(f) << (32 - Tables::bits)) words[written++] = uint16_t(state), state >>= 16;
      state = (state / f << Tables::bits) + state % f + t.start[symbol];
    }
  for (int64_t a = 0, b = written - 1; a < b; ++a, --b) std::swap(words[a], words[b]);
  return written;
}

// Reads the numbers, or the levels they stand for, and leaves the last states; returns how many words were read, or -1 if there are too few.
inline int64_t rans_decode(const Tables& t, const uint16_t* words, int64_t count, uint32_t* states, int64_t lanes, int8_t* numbers) {
  const int64_t tables = int64_t(t.frequency.size()) / 256;
  std::vector<uint8_t> symbols(tables << Tables::bits);
  for (int64_t s = 0; s < tables * 256; ++s)
    for (int n = 0; n < t.frequency[s]; ++n) symbols[(s / 256 << Tables::bits) + t.start[s] + n] = uint8_t(s);
  int64_t read = 0;
  for (int64_t i = 0; i < t.inputs; ++i)
    for (int64_t o = 0, path = 0; o < t.outputs; ++o) {
      const int64_t k = i * t.outputs + o, odd = path & 1, table = t.rows[i] + t.columns[o] + odd * t.half;
      uint32_t& state = states[k % lanes];
      const uint32_t slot = state & (Tables::whole - 1);
      const int symbol = symbols[(table << Tables::bits) + slot];
      state = t.frequency[table * 256 + symbol] * (state >> Tables::bits) + slot - t.start[table * 256 + symbol];
      if (state < Tables::least) {
        if (read == count) return -1;
        state = state << 16 | words[read++];
      }
      const int number = symbol - 128;
      numbers[k] = int8_t(t.half ? 2 * number - int(odd) * sign_of(number) : number);
      if (t.half) path = Paths::next[path][number & 1];
    }
  return read;
}
