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

bool takes_halves(int64_t D, int64_t B, const CodebookTiles& tile) { return D <= 8 && B == 1 && tile.add_halves; }

// The table with the slack that tile.expand and tile.add_eights need.
template <typename T>
static std::vector<T> padded(const T* table_KD, int K, int D) {
  std::vector<T> t(int64_t(K) * D + 16, 0);
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

// A table of float or uint16_t with its last entry repeated up to 2^16: any code of 16 bits may be looked up.
template <typename T>
static const T* lengthened(const T* table, int K, int D) {
  static thread_local std::vector<T> kept;  // fresh memory from the system would cost more than the work
  kept.resize(int64_t(D) << 16);
  std::copy_n(table, int64_t(K) * D, kept.begin());
  for (int64_t k = K; k < 1 << 16; k++) std::copy_n(table + int64_t(K - 1) * D, D, kept.begin() + k * D);
  return kept.data();
}

void multiply(const Codes& codes, const float* table_KD, const uint16_t* halves_KD, int D, int64_t B, int64_t I, int64_t O,
              const float* x_BI, float* y_BO, const CodebookTiles& tile, const Workers& workers) {
  const int64_t G = (O + D - 1) / D, rows = 8;
  const bool fours = D == 4 && B == 1 && O % 4 == 0, eights = D <= 8 && B == 1 && !fours;
  const bool in_place = fours && codes.bits == 16 && reinterpret_cast<uintptr_t>(codes.packed) % 2 == 0;
  const std::vector<float> table = fours || halves_KD ? std::vector<float>() : padded(table_KD, codes.K, D);
  const std::vector<uint16_t> halves = eights && halves_KD ? padded(halves_KD, codes.K, D) : std::vector<uint16_t>();
  if (in_place && halves_KD) halves_KD = lengthened(halves_KD, codes.K, D);
  else if (in_place) table_KD = lengthened(table_KD, codes.K, D);
  std::fill_n(y_BO, B * O, 0.f);
  // A task owns some outputs, few enough for their sums to stay in the nearest cache, and goes through all inputs in
  // order: the same sums however they are shared out.
  const int64_t wide = std::clamp<int64_t>((G + workers.threads - 1) / workers.threads, 64, eights ? 512 : 1024);
  workers.run((G + wide - 1) / wide, [&](int64_t task, int) {
    const int64_t g = task * wide, n = std::min(wide, G - g), first = g * D, outputs = std::min(n * D, O - first);
    std::vector<uint16_t> some_codes(in_place ? 0 : rows * n);
    std::vector<float> some(fours || eights ? 0 : rows * n * D + 16);
    std::vector<float> sums(eights ? n * 8 : 0);  // of each sub-vector, with room for eight
    for (int64_t i = 0; i < I; i += rows) {
      const int64_t now = std::min(rows, I - i), stride = in_place ? G : n;
      const uint16_t* code = some_codes.data();
      if (in_place) code = reinterpret_cast<const uint16_t*>(codes.packed) + i * G + g;
      for (int64_t r = 0; r < now && !in_place; r++) codes.read(tile, (i + r) * G + g, n, &some_codes[r * n]);
      if (eights && halves_KD) {
        tile.add_eight_halves(x_BI + i, now, code, stride, n, halves.data(), D, sums.data());
      } else if (halves_KD) {
        tile.add_halves(x_BI + i, now, code, stride, n, halves_KD, y_BO + first);
      } else if (fours) {
        tile.add_fours(x_BI + i, now, code, stride, n, table_KD, y_BO + first);
      } else if (eights) {
        tile.add_eights(x_BI + i, now, code, stride, n, table.data(), D, sums.data());
      } else {
        tile.expand(code, now * n, table.data(), D, some.data());
        for (int64_t b = 0; b < B; b++) tile.add_rows(x_BI + b * I + i, now, some.data(), n * D, y_BO + b * O + first, outputs);
      }
    }
    for (int64_t o = 0; eights && o < outputs; o++) y_BO[first + o] = sums[o / D * 8 + o % D];
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
