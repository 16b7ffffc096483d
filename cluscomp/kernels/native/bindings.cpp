// The Python face of the kernels. Arguments arrive checked and contiguous (kmeans.py); here only sizes are compared,
// and whether centroids are finite, so that no call, however wrong, can read or write outside its arrays.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <string>

#include "codebook.h"
#include "dependent.h"
#include "feedback.h"
#include "integers.h"
#include "lloyd.h"
#include "rans.h"
#include "scalar.h"
#include "trellis.h"

namespace nb = nanobind;
using Rows = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ByteRows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T> using Out1 = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T> using Out2 = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

static void require(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

template <typename T>
static Kind kind_of(const T& a) {
  const auto t = a.dtype();
  if (t == nb::dtype<float>()) return Kind::float32;
  if (t.bits == 16 && t.lanes == 1 && t.code == uint8_t(nb::dlpack::dtype_code::Float)) return Kind::float16;
  if (t.bits == 16 && t.lanes == 1 && t.code == uint8_t(nb::dlpack::dtype_code::Bfloat)) return Kind::bfloat16;
  throw std::invalid_argument("numbers must be float32, bfloat16 or float16");
}

static Search search_of(const std::string& name) {
  if (name == "choose") return Search::choose;
  if (name == "brute") return Search::brute;
  if (name == "lists") return Search::lists;
  if (name == "boxes") return Search::boxes;
  throw std::invalid_argument("search must be choose, brute, lists or boxes, not " + name);
}

static const Tiles& tiles_of(const std::string& name) {
  if (name.empty()) return tiles();
  const Tiles* t = tiles_named(name.c_str());
  if (!t) throw std::invalid_argument("this machine has no " + name);
  return *t;
}

// Workers that stop when Python has a signal waiting (Ctrl-C); to be used with the GIL released.
static Workers interruptible(int threads) {
  require(threads >= 1 && threads <= 1024, "threads must be 1 to 1024");
  Workers w;
  w.threads = threads;
  w.stop_asked = [] {
    nb::gil_scoped_acquire hold;
    return PyErr_CheckSignals() != 0;  // leaves KeyboardInterrupt set
  };
  return w;
}

// Runs work without the GIL; an exception set by a signal handler or callback is passed on.
template <typename Work>
static void without_gil(const Work& work) {
  bool stopped = false;
  {
    nb::gil_scoped_release release;
    try {
      work();
    } catch (const Stopped&) {
      stopped = true;
    }
  }
  if (stopped) throw nb::python_error();
}

static void check_sizes(int64_t N, int64_t D, int64_t K) {
  require(N >= 1 && N < (int64_t(1) << 31), "the number of points must be 1 to 2^31 - 1");
  require(D >= 1 && D <= 1024, "D must be 1 to 1024");
  require(K >= 1 && K < (int64_t(1) << 31) - 16, "the number of centroids must be 1 to 2^31 - 17");
}

using Integers = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

static void check_order(const Integers& order, int64_t K) {
  require(int64_t(order.shape(0)) == K, "sizes differ");
  std::vector<bool> seen(K);
  for (int64_t s = 0; s < K; s++) {
    const int32_t k = order.data()[s];
    require(k >= 0 && k < K && !seen[k], "the order must hold every centroid once");
    seen[k] = true;
  }
}

static void py_spatial_order(FloatRows centroids, Out1<int32_t> order, int threads) {
  const int64_t K = centroids.shape(0), D = centroids.shape(1);
  check_sizes(1, D, K);
  require(int64_t(order.shape(0)) == K, "sizes differ");
  const Workers workers = interruptible(threads);
  without_gil([&] {
    const std::vector<int32_t> found = spatial_order(centroids.data(), int(K), int(D), workers);
    std::copy(found.begin(), found.end(), order.data());
  });
}

// A nearest centroid exists only if none is NaN or infinite.
static void require_finite(const FloatRows& centroids) {
  const float* c = centroids.data();
  for (size_t i = 0; i < centroids.size(); i++) require(std::isfinite(c[i]), "centroids must be finite");
}

static void py_assign(Rows points, FloatRows centroids, Out1<int32_t> codes, Out1<float> distances, int threads,
                      const std::string& search, const std::string& isa, std::optional<Integers> order) {
  const int64_t N = points.shape(0), D = points.shape(1), K = centroids.shape(0);
  check_sizes(N, D, K);
  require_finite(centroids);
  require(int64_t(centroids.shape(1)) == D && int64_t(codes.shape(0)) == N && int64_t(distances.shape(0)) == N, "sizes differ");
  if (order) check_order(*order, K);
  const Kind kind = kind_of(points);
  const Search how = search_of(search);
  const Tiles& tile = tiles_of(isa);
  const Workers workers = interruptible(threads);
  without_gil([&] {
    Cloud cloud(N, int(D), false);
    fill(cloud.columns, points.data(), kind, nullptr, workers);
    Index(centroids.data(), int(K), int(D), how, order ? order->data() : nullptr, workers)
        .search(cloud.columns, codes.data(), distances.data(), tile, workers);
  });
}

static void make_index(Index* place, FloatRows centroids, int threads) {
  const int64_t K = centroids.shape(0), D = centroids.shape(1);
  check_sizes(1, D, K);
  require_finite(centroids);
  const Workers workers = interruptible(threads);
  without_gil([&] { new (place) Index(centroids.data(), int(K), int(D), Search::choose, nullptr, workers); });
}

static void py_feedback(const Index& index, Out2<float> wanted, std::optional<FloatRows> before, FloatRows factor,
                        Out2<int32_t> codes, Out2<float> errors, int threads, const std::string& isa) {
  const int64_t rounds = wanted.shape(0), groups = codes.shape(1), outputs = errors.shape(1), width = groups * index.D;
  require(rounds >= 1 && groups >= 1 && groups < (int64_t(1) << 31) && int64_t(wanted.shape(1)) == width, "sizes differ");
  require(outputs <= width && outputs > width - index.D, "sizes differ");
  require(!before || (int64_t(before->shape(0)) == rounds && int64_t(before->shape(1)) == width), "sizes differ");
  require(int64_t(factor.shape(0)) == rounds && int64_t(factor.shape(1)) == rounds, "sizes differ");
  require(int64_t(codes.shape(0)) == rounds && int64_t(errors.shape(0)) == rounds, "sizes differ");
  const Tiles& tile = tiles_of(isa);
  const Workers workers = interruptible(threads);
  const Rounds all{rounds, groups, outputs, wanted.data(), before ? before->data() : nullptr, factor.data(), codes.data(), errors.data()};
  without_gil([&] { feedback(index, all, tile, workers); });
}

static std::vector<double> py_lloyd(Rows points, const FloatRows& first, std::optional<FloatVector> weights,
                                    Out2<float> centroids, Out1<int32_t> codes, int iterations, bool kd, bool move_centroids,
                                    float over_relaxation, uint64_t seed, int threads, const std::string& search,
                                    const std::string& isa, std::optional<nb::callable> progress) {
  const int64_t N = points.shape(0), D = points.shape(1), K = centroids.shape(0);
  check_sizes(N, D, K);
  require(K <= N && iterations >= 0, "K must be at most N, iterations at least 0");
  require(int64_t(centroids.shape(1)) == D && int64_t(codes.shape(0)) == N, "sizes differ");
  require(!weights || int64_t(weights->shape(0)) == N, "sizes differ");
  require(kd || (int64_t(first.shape(0)) == K && int64_t(first.shape(1)) == D), "sizes differ");
  const Kind kind = kind_of(points);
  const Tiles& tile = tiles_of(isa);
  const Workers workers = interruptible(threads);
  LloydSettings set;
  set.K = int(K), set.iterations = iterations, set.kd = kd, set.move_centroids = move_centroids;
  set.over_relaxation = over_relaxation, set.seed = seed, set.search = search_of(search);
  if (!kd) set.first.assign(first.data(), first.data() + K * D);
  set.progress = [&](int done, double inertia) {
    nb::gil_scoped_acquire hold;
    if (PyErr_CheckSignals() != 0) throw Stopped{};
    if (!progress) return;
    PyObject* answer = PyObject_CallFunction(progress->ptr(), "id", done, inertia);
    if (!answer) throw Stopped{};
    Py_DECREF(answer);
  };
  LloydResult result;
  without_gil([&] {
    Cloud cloud(N, int(D), weights.has_value());
    fill(cloud.columns, points.data(), kind, weights ? weights->data() : nullptr, workers);
    result = lloyd(cloud, set, codes.data(), tile, workers);
  });
  std::copy(result.centroids.begin(), result.centroids.end(), centroids.data());
  return result.inertia;
}

static std::vector<int32_t> py_best_groups(const std::vector<double>& values, const std::vector<double>& mass, int K) {
  require(values.size() == mass.size() && K >= 1 && size_t(K) <= values.size(), "K must be 1 to the number of values");
  std::vector<int32_t> groups;
  const Workers workers = interruptible(1);
  without_gil([&] { groups = best_groups(values, mass, K, workers); });
  return groups;
}

static void py_best_levels(FloatRows values, FloatRows mass, Out2<float> levels, int threads) {
  const int64_t R = values.shape(0), C = values.shape(1), K = levels.shape(1);
  require(int64_t(mass.shape(0)) == R && int64_t(mass.shape(1)) == C && int64_t(levels.shape(0)) == R, "sizes differ");
  require(C >= 1 && C < (int64_t(1) << 31) && K >= 1 && K <= 65536, "rows must hold 1 to 2^31 - 1 numbers, levels be 1 to 65536");
  const Workers workers = interruptible(threads);
  without_gil([&] { best_levels(values.data(), mass.data(), R, C, int(K), levels.data(), workers); });
}

static Trellis trellis_of(const FloatVector& values, int width) {
  const int64_t N = values.shape(0);
  int state_bits = 0;
  while (state_bits < 20 && (int64_t(1) << state_bits) < N) state_bits++;
  require(N == int64_t(1) << state_bits, "the number of states must be a power of two up to 2^20");
  require(width >= 1 && width <= 8 && width < state_bits, "width must be 1 to 8, and below the state's bits");
  return {state_bits, width, values.data()};
}

static void py_best_paths(FloatRows targets, FloatVector values, int width, bool tail_biting, Out2<int32_t> states, int threads,
                          const std::string& isa) {
  const int64_t S = targets.shape(0), T = targets.shape(1);
  const Trellis trellis = trellis_of(values, width);
  require(T >= 1 && T < (1 << 24) && (!tail_biting || T * width >= trellis.state_bits), "a sequence must hold at least one state");
  require(int64_t(states.shape(0)) == S && int64_t(states.shape(1)) == T, "sizes differ");
  const TrellisTiles* tile = isa.empty() ? &trellis_tiles() : trellis_tiles_named(isa.c_str());
  if (!tile) throw std::invalid_argument("this machine has no " + isa);
  const Workers workers = interruptible(threads);
  const auto paths = tail_biting ? best_paths : best_free_paths;
  without_gil([&] { paths(trellis, targets.data(), S, T, states.data(), *tile, workers); });
}

static void py_follow_paths(ByteRows packed, FloatVector values, int width, Out2<float> numbers, int threads) {
  const int64_t S = packed.shape(0), bytes = packed.shape(1);
  const Trellis trellis = trellis_of(values, width);
  require(8 * bytes % width == 0 && 8 * bytes >= trellis.state_bits && bytes < (1 << 24), "a path must be whole steps and hold a state");
  require(int64_t(numbers.shape(0)) == S && int64_t(numbers.shape(1)) == 8 * bytes / width, "sizes differ");
  const Workers workers = interruptible(threads);
  without_gil([&] { follow_paths(trellis, packed.data(), S, bytes, numbers.data(), workers); });
}

// ---- codebook layers ----

using Packed = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

static const CodebookTiles& codebook_tiles_of(const std::string& name) {
  if (name.empty()) return codebook_tiles();
  const CodebookTiles* t = codebook_tiles_named(name.c_str());
  if (!t) throw std::invalid_argument("this machine has no " + name);
  return *t;
}

static Codes codes_of(const Packed& packed, int bits, int64_t count, int64_t K) {
  require(bits >= 1 && bits <= 16, "bits must be 1 to 16");
  require(count >= 1 && count < (int64_t(1) << 40) && int64_t(packed.shape(0)) == (count + 7) / 8 * bits, "packed has the wrong length");
  return {packed.data(), bits, count, int(K)};
}

// Sizes of a layer whose codes are a matrix of `along` by ceil(across / D).
static Codes layer_codes(const Packed& packed, int bits, int64_t K, int64_t D, int64_t along, int64_t across) {
  require(K >= 1 && K <= 65536 && D >= 1 && D <= 1024, "the codebook must have 1 to 65536 centroids of length 1 to 1024");
  require(along >= 1 && across >= 1 && along < (1 << 24) && across < (1 << 24), "the layer's sides must be 1 to 2^24 - 1");
  return codes_of(packed, bits, along * ((across + D - 1) / D), K);
}

static void py_pack(Integers codes, int bits, Out1<uint8_t> packed) {
  require(bits >= 1 && bits <= 16 && int64_t(packed.shape(0)) == (int64_t(codes.shape(0)) + 7) / 8 * bits, "packed has the wrong length");
  pack(codes.data(), codes.shape(0), bits, packed.data());
}

static void py_unpack(Packed packed, int bits, Out1<int32_t> out) {
  const Codes codes = codes_of(packed, bits, out.shape(0), 65536);
  std::vector<uint16_t> some(4096);
  for (int64_t i = 0; i < codes.count; i += 4096) {
    const int64_t n = std::min<int64_t>(4096, codes.count - i);
    codes.read(codebook_tiles(), i, n, some.data());
    std::copy_n(some.begin(), n, out.data() + i);
  }
}

static void py_decode(Packed packed, int bits, FloatRows centroids, Out2<float> weight_IO, int threads, const std::string& isa) {
  const int64_t I = weight_IO.shape(0), O = weight_IO.shape(1);
  const Codes codes = layer_codes(packed, bits, centroids.shape(0), centroids.shape(1), I, O);
  const CodebookTiles& tile = codebook_tiles_of(isa);
  const Workers workers = interruptible(threads);
  without_gil([&] { decode(codes, centroids.data(), int(centroids.shape(1)), I, O, weight_IO.data(), tile, workers); });
}

using HalfRows = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;  // (..., I)
using Products = nb::ndarray<nb::c_contig, nb::device::cpu>;         // (..., O)

// Of numpy's arrays, which have no bfloat16: whole numbers of 16 bits are its bits.
template <typename T>
static Kind kind_or_bits(const T& a) {
  return a.dtype() == nb::dtype<uint16_t>() ? Kind::bfloat16 : kind_of(a);
}

static void py_multiply(Packed packed, int bits, Rows centroids, Tokens x_BI, Products y_BO, int threads, const std::string& isa) {
  require(x_BI.ndim() >= 1 && y_BO.ndim() >= 1 && x_BI.size() >= 1, "no numbers");
  const int64_t K = centroids.shape(0), D = centroids.shape(1), I = x_BI.shape(x_BI.ndim() - 1), O = y_BO.shape(y_BO.ndim() - 1);
  const int64_t B = x_BI.size() / I;
  require(B < (1 << 24) && int64_t(y_BO.size()) == B * O, "sizes differ");
  const Codes codes = layer_codes(packed, bits, K, D, I, O);
  const CodebookTiles& tile = codebook_tiles_of(isa);
  const Kind stored = kind_of(centroids), of_x = kind_or_bits(x_BI), of_y = kind_or_bits(y_BO);
  require(stored == Kind::float32 || (stored == Kind::float16 && takes_halves(D, tile)), "such centroids are not taken for these sizes");
  const float* table = stored == Kind::float32 ? static_cast<const float*>(centroids.data()) : nullptr;
  const uint16_t* halves = table ? nullptr : static_cast<const uint16_t*>(centroids.data());
  const Workers workers = interruptible(threads);
  without_gil([&] {
    std::vector<float> x(of_x == Kind::float32 ? 0 : B * I), y(of_y == Kind::float32 ? 0 : B * O);
    if (!x.empty()) tile.widen(of_x == Kind::bfloat16, static_cast<const uint16_t*>(x_BI.data()), B * I, x.data());
    const float* from = x.empty() ? static_cast<const float*>(x_BI.data()) : x.data();
    float* to = y.empty() ? static_cast<float*>(y_BO.data()) : y.data();
    multiply(codes, table, halves, int(D), B, I, O, from, to, tile, workers);
    if (!y.empty()) tile.narrow(of_y == Kind::bfloat16, y.data(), B * O, static_cast<uint16_t*>(y_BO.data()));
  });
}

// Arguments of numpy, as `py_multiply`'s.
static void py_multiply_halves(Rows weight_OI, FloatRows x_BI, Out2<float> y_BO, int threads, const std::string& isa) {
  const int64_t O = weight_OI.shape(0), I = weight_OI.shape(1), B = x_BI.shape(0);
  require(int64_t(x_BI.shape(1)) == I && int64_t(y_BO.shape(0)) == B && int64_t(y_BO.shape(1)) == O, "sizes differ");
  const Kind kind = kind_or_bits(weight_OI);
  require(kind != Kind::float32, "the weight must have numbers of 16 bits");
  const uint16_t* weight = static_cast<const uint16_t*>(weight_OI.data());
  const CodebookTiles& tile = codebook_tiles_of(isa);
  const Workers workers = interruptible(threads);
  constexpr int64_t SOME = 512;  // outputs of a task
  without_gil([&] {
    workers.run((O + SOME - 1) / SOME, [&](int64_t task, int) {
      const int64_t o = task * SOME;
      tile.multiply_halves(kind == Kind::bfloat16, weight + o * I, std::min(SOME, O - o), I, x_BI.data(), B, y_BO.data() + o, O);
    });
  });
}

static void py_multiply_by_tables(Packed packed, FloatRows centroids, FloatVector x_I, Out1<float> y_O, int threads,
                                  const std::string& isa) {
  const int64_t I = x_I.shape(0), O = y_O.shape(0), K = centroids.shape(0), D = centroids.shape(1);
  require(K <= 256, "tables serve up to 256 centroids");
  require(I >= 1 && I < (1 << 24) && O >= 1 && O < (1 << 24) && D >= 1 && D <= 1024 && K >= 1, "sizes out of range");
  const Codes codes = codes_of(packed, 8, (I + D - 1) / D * O, K);
  const CodebookTiles& tile = codebook_tiles_of(isa);
  const Workers workers = interruptible(threads);
  without_gil([&] { multiply_by_tables(codes, centroids.data(), int(D), I, O, x_I.data(), y_O.data(), tile, workers); });
}

static void py_gradient(Packed packed, int bits, FloatRows grad_IO, Out2<float> gradient_KD, int threads, const std::string& isa) {
  const int64_t I = grad_IO.shape(0), O = grad_IO.shape(1);
  const Codes codes = layer_codes(packed, bits, gradient_KD.shape(0), gradient_KD.shape(1), I, O);
  const CodebookTiles& tile = codebook_tiles_of(isa);
  const Workers workers = interruptible(threads);
  without_gil([&] {
    gradient(codes, int(gradient_KD.shape(1)), I, O, grad_IO.data(), gradient_KD.data(), tile, workers);
  });
}

// ---- whole numbers ----

static void py_round_rows(Out2<float> wanted, FloatRows factor, FloatVector steps, Out2<int8_t> numbers,
                          Out1<float> scales, Out2<float> errors) {
  const size_t R = wanted.shape(0), O = wanted.shape(1);
  require(factor.shape(0) == R && factor.shape(1) == R && steps.shape(0) == R && scales.shape(0) == R, "sizes differ");
  require(numbers.shape(0) == R && numbers.shape(1) == O && errors.shape(0) == R && errors.shape(1) == O, "sizes differ");
  without_gil([&] {
    round_rows(int64_t(R), int64_t(O), wanted.data(), factor.data(), steps.data(), numbers.data(), scales.data(), errors.data());
  });
}

using SignedRows = nb::ndarray<const int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

static void py_round_on_paths(Out2<float> wanted, FloatRows factor, FloatVector steps, Packed rows, FloatRows lengths, double price,
                              Out2<int8_t> levels, Out1<float> scales, Out2<float> errors) {
  const size_t R = wanted.shape(0), O = wanted.shape(1), tables = lengths.shape(0) / 2;
  require(factor.shape(0) == R && factor.shape(1) == R && steps.shape(0) == R && scales.shape(0) == R, "sizes differ");
  require(levels.shape(0) == R && levels.shape(1) == O && errors.shape(0) == R && errors.shape(1) == O, "sizes differ");
  require(rows.shape(0) == R && lengths.shape(1) == 256, "sizes differ");
  for (size_t i = 0; i < R; ++i) require(rows.data()[i] < tables, "a row points past the tables");
  without_gil([&] {
    round_on_paths(int64_t(R), int64_t(O), wanted.data(), factor.data(), steps.data(), rows.data(), lengths.data(), int64_t(tables), price,
                   levels.data(), scales.data(), errors.data());
  });
}

static void py_symbols_of(SignedRows levels, Out2<int8_t> symbols, Out2<uint8_t> odd) {
  const size_t I = levels.shape(0), O = levels.shape(1);
  require(symbols.shape(0) == I && symbols.shape(1) == O && odd.shape(0) == I && odd.shape(1) == O, "sizes differ");
  symbols_of(int64_t(I), int64_t(O), levels.data(), symbols.data(), odd.data());
}

static Tables tables_of(const Packed& rows, const Packed& columns, const HalfRows& frequencies, bool dependent) {
  require(frequencies.shape(1) == 256, "a table has 256 frequencies");
  return Tables(rows.shape(0), columns.shape(0), rows.data(), columns.data(), frequencies.data(), frequencies.shape(0), dependent);
}

static int64_t py_rans_encode(SignedRows numbers, std::optional<ByteRows> odd, Packed rows, Packed columns, HalfRows frequencies, Out1<uint32_t> states, Out1<uint16_t> words) {
  require(numbers.shape(0) == rows.shape(0) && numbers.shape(1) == columns.shape(0), "sizes differ");
  require(states.shape(0) >= 1 && words.shape(0) >= numbers.size(), "sizes differ");
  require(!odd || (odd->shape(0) == rows.shape(0) && odd->shape(1) == columns.shape(0)), "sizes differ");
  int64_t written = 0;
  without_gil([&] {
    written = rans_encode(tables_of(rows, columns, frequencies, bool(odd)), numbers.data(), odd ? odd->data() : nullptr, states.data(), states.shape(0), words.data());
  });
  return written;
}

static int64_t py_rans_decode(nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> words, Packed rows, Packed columns,
                              HalfRows frequencies, bool dependent, Out1<uint32_t> states, Out2<int8_t> numbers) {
  require(numbers.shape(0) == rows.shape(0) && numbers.shape(1) == columns.shape(0) && states.shape(0) >= 1, "sizes differ");
  int64_t read = 0;
  without_gil([&] {
    const Tables tables = tables_of(rows, columns, frequencies, dependent);
    read = rans_decode(tables, words.data(), words.shape(0), states.data(), states.shape(0), numbers.data());
  });
  return read;
}

NB_MODULE(_native, m) {
  m.doc() = "Compiled inner loops of cluscomp.kernels; see kmeans.py and codebook.py there.";
  m.def("instruction_set", [] { return std::string(tiles().name); });
  m.def("assign", py_assign, nb::arg("points"), nb::arg("centroids"), nb::arg("codes"), nb::arg("distances"),
        nb::arg("threads"), nb::arg("search") = "choose", nb::arg("isa") = "", nb::arg("order").none() = nb::none());
  m.def("spatial_order", py_spatial_order, nb::arg("centroids"), nb::arg("order"), nb::arg("threads"));
  nb::class_<Index>(m, "Index").def("__init__", make_index, nb::arg("centroids"), nb::arg("threads"));
  m.def("feedback", py_feedback, nb::arg("index"), nb::arg("wanted"), nb::arg("before").none(), nb::arg("factor"), nb::arg("codes"),
        nb::arg("errors"), nb::arg("threads"), nb::arg("isa") = "");
  m.def("lloyd", py_lloyd, nb::arg("points"), nb::arg("first"), nb::arg("weights").none(), nb::arg("centroids"),
        nb::arg("codes"), nb::arg("iterations"), nb::arg("kd"), nb::arg("move_centroids"), nb::arg("over_relaxation"),
        nb::arg("seed"), nb::arg("threads"), nb::arg("search") = "choose", nb::arg("isa") = "",
        nb::arg("progress").none() = nb::none());
  m.def("best_groups", py_best_groups, nb::arg("values"), nb::arg("mass"), nb::arg("K"));
  m.def("best_levels", py_best_levels, nb::arg("values"), nb::arg("mass"), nb::arg("levels"), nb::arg("threads"));
  m.def("best_paths", py_best_paths, nb::arg("targets"), nb::arg("values"), nb::arg("width"), nb::arg("tail_biting"),
        nb::arg("states"), nb::arg("threads"), nb::arg("isa") = "");
  m.def("follow_paths", py_follow_paths, nb::arg("packed"), nb::arg("values"), nb::arg("width"), nb::arg("numbers"), nb::arg("threads"));
  m.def("pack", py_pack, nb::arg("codes"), nb::arg("bits"), nb::arg("packed"));
  m.def("unpack", py_unpack, nb::arg("packed"), nb::arg("bits"), nb::arg("codes"));
  m.def("decode", py_decode, nb::arg("packed"), nb::arg("bits"), nb::arg("centroids"), nb::arg("weight"), nb::arg("threads"), nb::arg("isa") = "");
  m.def("takes_halves", [](int64_t D) { return takes_halves(D, codebook_tiles()); });
  m.def("multiply", py_multiply, nb::arg("packed"), nb::arg("bits"), nb::arg("centroids"), nb::arg("x"), nb::arg("y"), nb::arg("threads"),
        nb::arg("isa") = "");
  m.def("multiply_halves", py_multiply_halves, nb::arg("weight"), nb::arg("x"), nb::arg("y"), nb::arg("threads"), nb::arg("isa") = "");
  m.def("multiply_by_tables", py_multiply_by_tables, nb::arg("packed"), nb::arg("centroids"), nb::arg("x"), nb::arg("y"),
        nb::arg("threads"), nb::arg("isa") = "");
  m.def("round_rows", py_round_rows, nb::arg("wanted"), nb::arg("factor"), nb::arg("steps"), nb::arg("numbers"),
        nb::arg("scales"), nb::arg("errors"));
  m.def("round_on_paths", py_round_on_paths, nb::arg("wanted"), nb::arg("factor"), nb::arg("steps"), nb::arg("rows"), nb::arg("lengths"),
        nb::arg("price"), nb::arg("levels"), nb::arg("scales"), nb::arg("errors"));
  m.def("symbols_of", py_symbols_of, nb::arg("levels"), nb::arg("symbols"), nb::arg("odd"));
  m.def("rans_encode", py_rans_encode, nb::arg("numbers"), nb::arg("odd").none(), nb::arg("rows"), nb::arg("columns"), nb::arg("frequencies"),
        nb::arg("states"), nb::arg("words"));
  m.def("rans_decode", py_rans_decode, nb::arg("words"), nb::arg("rows"), nb::arg("columns"), nb::arg("frequencies"),
        nb::arg("dependent"), nb::arg("states"), nb::arg("numbers"));
  m.def("gradient", py_gradient, nb::arg("packed"), nb::arg("bits"), nb::arg("grad"), nb::arg("gradient"), nb::arg("threads"),
        nb::arg("isa") = "");
}
