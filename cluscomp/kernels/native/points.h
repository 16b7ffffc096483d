// Points in columns: the memory behind `Columns`, filled from the caller's rows of float32, bfloat16 or float16.
#pragma once
#include <stdexcept>

#include "threads.h"
#include "tiles.h"

enum class Kind { float32, bfloat16, float16 };

class Cloud {
 public:
  Cloud(int64_t n, int D, bool weighted);
  ~Cloud();
  Cloud(const Cloud&) = delete;
  Columns columns{};
};

// Copies rows_ND (and weights_N, or null) into columns, numbered 0..N-1.
// Throws std::invalid_argument naming the first value that is not finite or is beyond 1e15 in size.
void fill(const Columns&, const void* rows_ND, Kind, const float* weights_N, const Workers&);
