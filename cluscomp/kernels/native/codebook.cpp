#include "codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

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

bool takes_halves(int64_t D, const CodebookTiles& tile) { return D <= 8 && tile.add_four_halves; }

// The table with the slack that tile.expand needs.
static std::vector<float> padded(const float* table_KD, int K, int D) {
  std::vector<float> t(int64_t(K) * D + 16, 0);
  std::copy_n(table_KD, int64_t(K) * D, t.begin());
  return t;
}

void decode(const Codes& codes, const float* table_KD, int D, int64_t I, int64_t O, float* weight_IO, const CodebookTiles& tile,
            const Workers& workers) {
  const int64_t G = (O + D - 1) / D, rows = 16;
  const bool exact = G * D == O && (D == 2 || D == 4 || D == 8);  // tile.expand writes nothing beyond a row's end
  const std::vector<float> table = exact ? std::vector<float>() : padded(table_KD, codes.K, D);
  workers.run((I + rows - 1) / rows, [&](int64_t block, int) {
    std::vector<uint16_t> code(G);
    std::vector<float> row(exact ? 0 : G * D + 16);
    for (int64_t i = block * rows; i < std::min(I, (block + 1) * rows); i++) {
      codes.read(tile, i * G, G, code.data());
      if (exact) {
        tile.expand(code.data(), G, table_KD, D, weight_IO + i * O);
      } else {
        tile.expand(code.data(), G, table.data(), D, row.data());
        std::memcpy(weight_IO + i * O, row.data(), O * 4);
      }
    }
  });
}

// A table of float or uint16_t with an entry every `lanes` numbers; what follows the D of an entry is never used. The last
// entry is repeated up to `size`.
template <typename T>
static const T* spread(const T* table_KD, int K, int D, int lanes, int64_t size) {
  static thread_local std::vector<T> kept;  // fresh memory from the system would cost more than the work
  if (int64_t(kept.size()) < size * lanes) kept.resize(size * lanes);
  T* to = kept.data();
  // As many numbers at once as the compiler knows of, so long as they lie within the table.
  const int64_t within = D == lanes ? 0 : std::max<int64_t>(0, K - (lanes + D - 1) / D);
  for (int64_t k = 0; k < within && lanes == 4; k++) std::memcpy(to + k * 4, table_KD + k * D, 4 * sizeof(T));
  for (int64_t k = 0; k < within && lanes == 8; k++) std::memcpy(to + k * 8, table_KD + k * D, 8 * sizeof(T));
  if (D == lanes) std::copy_n(table_KD, int64_t(K) * D, to);
  else for (int64_t k = within; k < K; k++) std::copy_n(table_KD + k * D, D, to + k * lanes);
  for (int64_t k = K; k < size; k++) std::copy_n(to + int64_t(K - 1) * lanes, lanes, to + k * lanes);
  return to;
}

void multiply(const Codes& codes, const float* table_KD, const uint16_t* halves_KD, int D, int64_t B, int64_t I, int64_t O,
              const float* x_BI, float* y_BO, const CodebookTiles& tile, const Workers& workers) {
  const int64_t G = (O + D - 1) / D, inputs = B < 4 ? 8 : 32, lanes = D <= 4 ? 4 : D <= 8 ? 8 : 0;
  // Codes of 16 bits are used where they lie, once the table has an entry for each: where that is less work than to read them.
  const bool in_place = lanes && codes.bits == 16 && codes.count >= 16 << 16 && reinterpret_cast<uintptr_t>(codes.packed) % 2 == 0;
  const bool exact = D == lanes && O % D == 0;  // sums are those of y, none is left over
  std::vector<float> table;
  if (!lanes) table = padded(table_KD, codes.K, D), table_KD = table.data();
  if (lanes && (D != lanes || in_place)) {
    const int64_t size = in_place ? 1 << 16 : codes.K;
    if (halves_KD) halves_KD = spread(halves_KD, codes.K, D, int(lanes), size);
    else table_KD = spread(table_KD, codes.K, D, int(lanes), size);
  }
  std::fill_n(y_BO, B * O, 0.f);
  // A task owns some outputs, few enough for their sums to stay in the nearest cache, and goes through all inputs in
  // order: the same sums however they are shared out.
  const int64_t most = lanes ? std::max<int64_t>(4096 / (lanes * B), 128) : 1024;
  const int64_t wide = std::clamp<int64_t>((G + workers.threads - 1) / workers.threads, 64, most);
  workers.run((G + wide - 1) / wide, [&](int64_t task, int) {
    const int64_t g = task * wide, n = std::min(wide, G - g), first = g * D, outputs = std::min(n * D, O - first);
    std::vector<uint16_t> some_codes(in_place ? 0 : inputs * n);
    std::vector<float> some(lanes ? 0 : inputs * n * D + 16), sums(lanes && !exact ? B * n * lanes : 0);
    for (int64_t i = 0; i < I; i += inputs) {
      const int64_t now = std::min(inputs, I - i);
      for (int64_t r = 0; r < now && !in_place; r++) codes.read(tile, (i + r) * G + g, n, &some_codes[r * n]);
      Sums s{B, now, n, x_BI + i, I, some_codes.data(), n, y_BO + first, O, {}, codes.bits, G * codes.bits};
      for (int64_t r = 0; r < 8; r++) s.soon[r] = codes.packed + (std::min(i + inputs + r, I - 1) * G + g) * codes.bits / 8;
      if (in_place) s.code = reinterpret_cast<const uint16_t*>(codes.packed) + i * G + g, s.code_stride = G;
      if (!exact) s.y = sums.data(), s.y_stride = n * lanes;
      if (!lanes) {
        tile.expand(some_codes.data(), now * n, table_KD, D, some.data());
        for (int64_t b = 0; b < B; b++) tile.add_rows(x_BI + b * I + i, now, some.data(), n * D, y_BO + b * O + first, outputs);
      } else if (halves_KD) {
        (lanes == 4 ? tile.add_four_halves : tile.add_eight_halves)(s, halves_KD);
      } else {
        (lanes == 4 ? tile.add_fours : tile.add_eights)(s, table_KD);
      }
    }
    for (int64_t b = 0; b < B && lanes && !exact; b++)
      for (int64_t o = 0, at = b * n * lanes; o < outputs; o += D, at += lanes)
        std::copy_n(&sums[at], std::min<int64_t>(D, outputs - o), y_BO + b * O + first + o);
  });
}

void multiply_by_tables(const Codes& codes, const float* table_KD, int D, int64_t I, int64_t O, const float* x_I, float* y_O,
                        const CodebookTiles& tile, const Workers& workers) {
  const int64_t G = (I + D - 1) / D;
  std::vector<float> by_axis(int64_t(D) * 256, 0), x(G * D, 0);
  std::copy_n(x_I, I, x.begin());
  for (int k = 0; k < codes.K; k++)
    for (int d = 0; d < D; d++) by_axis[d * 256 + k] = table_KD[int64_t(k) * D + d];
  static thread_local std::vector<uint8_t> kept;  // fresh memory from the system would cost more than the work
  kept.resize(std::max<size_t>(kept.size(), G * 1024));
  uint8_t* tables = kept.data();  // (thread_local: the workers must not look for their own)
  tile.tabulate(by_axis.data(), x.data(), G, D, tables);
  const int64_t wide = std::clamp<int64_t>((O + 64 * workers.threads - 1) / (64 * workers.threads) * 64, 1024, 4096);
  workers.run((O + wide - 1) / wide, [&](int64_t task, int) {
    const int64_t o = task * wide, n = std::min(wide, O - o);
    tile.look_up(codes.packed + o, O, n, G, tables, y_O + o);
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
        codes.read(tile, i * G, G, code.data());
        const float* row = grad_IO + i * O;
        tile.scatter(code.data(), O / D, row, D, sums[s].data());
        for (int64_t o = O / D * D; o < O; o++) sums[s][int64_t(code[G - 1]) * D + o % D] += row[o];
      }
    });
    workers.run((all + chunk - 1) / chunk, [&](int64_t c, int) {
      const float one = 1;
      for (int64_t s = 0; s < now; s++)
        tile.add_rows(&one, 1, &sums[s][c * chunk], 0, gradient_KD + c * chunk, std::min(chunk, all - c * chunk));
    });
  }
}
