#include "points.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#ifdef __linux__
#include <sys/mman.h>
#endif

Cloud::Cloud(int64_t n, int D, bool weighted) {
  columns.n = n, columns.D = D, columns.weighted = weighted;
  // At least 64 floats of slack; never a multiple of a page, or all rows would fight for the same cache lines.
  columns.stride = (n + 64 + 1023) / 1024 * 1024 + 80;
  const size_t huge = size_t(1) << 21, bytes = (columns.rows() * columns.stride * 4 + huge - 1) / huge * huge;
  columns.data = static_cast<float*>(std::aligned_alloc(huge, bytes));
  if (!columns.data) throw std::bad_alloc();
#ifdef __linux__
  madvise(columns.data, bytes, MADV_HUGEPAGE);  // points are scattered all over: fewer address translations
#endif
  for (int d = 0; d < columns.rows(); d++) std::memset(columns.row(d) + n, 0, (columns.stride - n) * 4);
}

Cloud::~Cloud() { std::free(columns.data); }

static float as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }

static float half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return as_float(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return std::copysign(float(fraction) * 5.9604644775390625e-8f, as_float(sign));  // 2^-24
  return as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

void fill(const Columns& x, const void* rows_ND, Kind kind, const float* weights_N, const Workers& workers) {
  const int64_t chunk = 8192;
  workers.run((x.n + chunk - 1) / chunk, [&](int64_t task, int) {
    const int64_t begin = task * chunk, end = std::min(x.n, begin + chunk);
    for (int d = 0; d < x.D; d++) {
      float* to = x.row(d);
      const float* single = static_cast<const float*>(rows_ND) + d;
      const uint16_t* shorts = static_cast<const uint16_t*>(rows_ND) + d;
      if (kind == Kind::float32) for (int64_t i = begin; i < end; i++) to[i] = single[i * x.D];
      if (kind == Kind::bfloat16) for (int64_t i = begin; i < end; i++) to[i] = as_float(uint32_t(shorts[i * x.D]) << 16);
      if (kind == Kind::float16) for (int64_t i = begin; i < end; i++) to[i] = half(shorts[i * x.D]);
      bool good = true;
      for (int64_t i = begin; i < end; i++) good &= std::fabs(to[i]) <= 1e15f;
      for (int64_t i = begin; !good && i < end; i++)
        if (!(std::fabs(to[i]) <= 1e15f))
          throw std::invalid_argument("points[" + std::to_string(i) + ", " + std::to_string(d) + "] is " + std::to_string(to[i]) +
                                      "; every coordinate must be finite and within 1e+15");
    }
    for (int64_t i = begin; i < end; i++) x.number()[i] = int32_t(i);
    if (x.weighted) std::memcpy(x.weight() + begin, weights_N + begin, (end - begin) * 4);
  });
}
