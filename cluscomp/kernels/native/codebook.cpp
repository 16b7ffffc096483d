#include "codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

void Codes::read(int64_t begin, int64_t n, uint16_t* out) const {
  const uint64_t mask = (uint64_t(1) << bits) - 1;
  const int64_t bytes = (count + 7) / 8 * bits;
  int64_t i = 0;
  if (bits == 8) {
    for (; i < n; i++) out[i] = packed[begin + i];
  } else if (bits == 16) {
    for (; i < n; i++) std::memcpy(out + i, packed + 2 * (begin + i), 2);
  }
  // Otherwise four codes at a time out of 64 bits, as long as eight bytes may be read, and then one by one.
  for (; i + 4 <= n; i += 4) {
    const int64_t bit = (begin + i) * bits, byte = bit >> 3;
    if (bits > 14 || byte + 8 > bytes) break;  // 4 * 14 + 7 = 63 bits
    uint64_t window;
    std::memcpy(&window, packed + byte, 8);
    window >>= bit & 7;
    for (int j = 0; j < 4; j++) out[i + j] = uint16_t(window >> j * bits & mask);
  }
  for (; i < n; i++) {
    const int64_t bit = (begin + i) * bits, byte = bit >> 3;
    uint32_t window = 0;
    std::memcpy(&window, packed + byte, std::min<int64_t>(4, bytes - byte));
    out[i] = uint16_t(window >> (bit & 7) & mask);
  }
  const uint16_t last = uint16_t(K - 1);
  for (i = 0; i < n; i++) out[i] = std::min(out[i], last);
}

void pack(const int32_t* codes, int64_t n, int bits, uint8_t* packed) {
  std::fill_n(packed, (n + 7) / 8 * bits, uint8_t(0));
  for (int64_t i = 0; i < n; i++) {
    if (codes[i] < 0 || codes[i] >= 1 << bits)
      throw std::invalid_argument("codes[" + std::to_string(i) + "] is " + std::to_string(codes[i]) + "; it must be 0 to 2^" +
                                  std::to_string(bits) + " - 1");
    for (int64_t bit = i * bits, left = bits, value = codes[i]; left > 0;) {
      const int64_t room = std::min<int64_t>(8 - bit % 8, left);
      packed[bit / 8] |= uint8_t((value & ((1 << room) - 1)) << bit % 8);
      bit += room, left -= room, value >>= room;
    }
  }
}

// The table with the slack that tile.expand needs.
static std::vector<float> padded(const float* table_KD, int K, int D) {
  std::vector<float> t(int64_t(K) * D + 16, 0);
  std::copy_n(table_KD, int64_t(K) * D, t.begin());
  return t;
}

void decode(const Codes& codes, const float* table_KD, int D, int64_t I, int64_t O, float* weight_IO, const CodebookTiles& tile,
            const Workers& workers) {
  const int64_t G = (O + D - 1) / D, rows = 16;
  const std::vector<float> table = padded(table_KD, codes.K, D);
  workers.run((I + rows - 1) / rows, [&](int64_t block, int) {
    std::vector<uint16_t> code(G);
    std::vector<float> row(G * D + 16);
    for (int64_t i = block * rows; i < std::min(I, (block + 1) * rows); i++) {
      codes.read(i * G, G, code.data());
      tile.expand(code.data(), G, table.data(), D, row.data());
      std::memcpy(weight_IO + i * O, row.data(), O * 4);
    }
  });
}

void multiply(const Codes& codes, const float* table_KD, const uint16_t* halves_KD, int D, int64_t B, int64_t I, int64_t O,
              const float* x_BI, float* y_BO, const CodebookTiles& tile, const Workers& workers) {
  const int64_t G = (O + D - 1) / D;
  const bool fours = D == 4 && B == 1 && O % 4 == 0;
  const bool halves = fours && halves_KD && tile.add_halves;
  const std::vector<float> table = fours ? std::vector<float>() : padded(table_KD, codes.K, D);
  std::fill_n(y_BO, B * O, 0.f);
  // A task owns some outputs and goes through all inputs in order: the same sums however they are shared out.
  const int64_t wide = std::max<int64_t>(std::min<int64_t>(G, 64), (G + workers.threads - 1) / workers.threads);
  workers.run((G + wide - 1) / wide, [&](int64_t task, int) {
    const int64_t g = task * wide, n = std::min(wide, G - g), first = g * D, outputs = std::min(n * D, O - first);
    std::vector<uint16_t> code(n);
    std::vector<float> row(n * D + 16);
    for (int64_t i = 0; i < I; i++) {
      codes.read(i * G + g, n, code.data());
      if (halves) {
        tile.add_halves(x_BI[i], code.data(), n, halves_KD, y_BO + first);
      } else if (fours) {
        tile.add_fours(x_BI[i], code.data(), n, table_KD, y_BO + first);
      } else {
        tile.expand(code.data(), n, table.data(), D, row.data());
        for (int64_t b = 0; b < B; b++) tile.add_multiple(x_BI[b * I + i], row.data(), y_BO + b * O + first, outputs);
      }
    }
  });
}

void multiply_by_tables(const Codes& codes, const float* table_KD, int D, int64_t I, int64_t O, const float* x_I, bool bytes,
                        float* y_O, const CodebookTiles& tile, const Workers& workers) {
  const int64_t G = (I + D - 1) / D, even = (G + 1) / 2 * 2, wide = 2048;
  // Kept between calls: fresh memory from the system would cost more than the work.
  static thread_local std::vector<float> products;
  static thread_local std::vector<uint8_t> low;
  static thread_local std::vector<int8_t> high;
  products.assign(even * 256, 0);  // an odd last row is paired with a table of zeros
  std::vector<float> by_axis(int64_t(D) * 256, 0), x(G * D, 0);
  std::copy_n(x_I, I, x.begin());
  for (int k = 0; k < codes.K; k++)
    for (int d = 0; d < D; d++) by_axis[d * 256 + k] = table_KD[int64_t(k) * D + d];
  for (int64_t g = 0; g < G; g++)
    for (int d = 0; d < D; d++) tile.add_multiple(x[g * D + d], &by_axis[d * 256], &products[g * 256], 256);
  bytes = bytes && tile.look_up_bytes;
  low.resize(bytes ? even * 256 : 0), high.resize(low.size());
  const float scale = bytes ? tile.to_bytes(products.data(), even * 256, low.data(), high.data()) : 0;
  const float* tables = products.data();  // (thread_local: the workers must not look for their own)
  const uint8_t* low_bytes = low.data();
  const int8_t* high_bytes = high.data();
  std::fill_n(y_O, O, 0.f);
  workers.run((O + wide - 1) / wide, [&](int64_t task, int) {
    const int64_t o = task * wide, n = std::min(wide, O - o), whole = bytes ? n / 64 * 64 : 0;
    const uint8_t* code = codes.packed + o;
    if (whole > 0) tile.look_up_bytes(code, O, whole, G / 2, low_bytes, high_bytes, scale, y_O + o);
    for (int64_t g = 0; g < G; g += 2) {
      const int64_t from = g + 1 < G ? whole : 0;  // of the last row of an odd number, nothing is done yet
      tile.look_up(code + g * O + from, g + 1 < G ? O : 0, n - from, tables + g * 256, y_O + o + from);
    }
  });
}

void gradient(const Codes& codes, int D, int64_t I, int64_t O, const float* grad_IO, float* gradient_KD, const CodebookTiles& tile,
              const Workers& workers) {
  // Rows are cut in parts, by sizes alone; each part is summed by itself and the sums are added in order: the same for
  // any number of threads. A thread has one codebook of its own, which is small enough to stay near it.
  const int64_t G = (O + D - 1) / D, all = int64_t(codes.K) * D, threads = workers.threads, chunk = 16384;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({8, I, I * G / (8 * int64_t(codes.K))}));
  std::vector<std::vector<float>> sums(std::min(parts, threads), std::vector<float>(all));
  std::fill_n(gradient_KD, all, 0.f);
  for (int64_t first = 0; first < parts; first += threads) {
    const int64_t now = std::min(threads, parts - first);
    workers.run(now, [&](int64_t s, int) {
      std::fill(sums[s].begin(), sums[s].end(), 0.f);
      std::vector<uint16_t> code(G);
      for (int64_t i = I * (first + s) / parts; i < I * (first + s + 1) / parts; i++) {
        codes.read(i * G, G, code.data());
        const float* row = grad_IO + i * O;
        tile.scatter(code.data(), O / D, row, D, sums[s].data());
        for (int64_t o = O / D * D; o < O; o++) sums[s][int64_t(code[G - 1]) * D + o % D] += row[o];
      }
    });
    workers.run((all + chunk - 1) / chunk, [&](int64_t c, int) {
      for (int64_t s = 0; s < now; s++)
        tile.add_multiple(1.f, &sums[s][c * chunk], gradient_KD + c * chunk, std::min(chunk, all - c * chunk));
    });
  }
}
