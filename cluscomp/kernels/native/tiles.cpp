// The inner loops. This file is compiled once per instruction set, with CLUSCOMP_ISA naming it.
//
// Every squared distance here is ((x0-c0)^2 + (x1-c1)^2) + ..., in float32, in this order, with FMA where there is
// one, so all tiles give bitwise the same distance for the same pair and the same winner. Box distances are built
// from the same operations on numbers that are not larger; rounding is monotone, so a box distance never exceeds
// the distance to any centroid inside, to the last bit: pruning by boxes is exact with no tolerance.
#include "tiles.h"

#include "simd.h"

#ifndef CLUSCOMP_ISA
#error "CLUSCOMP_ISA must name the instruction set"
#endif
#define STRING(x) #x
#define NAME(x) STRING(x)

namespace CLUSCOMP_ISA {

// D is known when compiling for 1..16 (loops unroll, points stay in registers); D = 0 reads it from `dims`.
#define EACH_DIMENSION(d) for (int d = 0, d##_end = D ? D : dims; d < d##_end; d++)

INLINE F square_sum(const F& t, const F& sum, bool first) { return first ? t * t : fma(t, t, sum); }

// Squared distances of 16 points (column pointers p, stride apart) to one centroid (c, step apart).
template <int D>
INLINE F distance_points(const float* p, int64_t stride, const float* c, int64_t step, int dims) {
  F sum = all(0);
  EACH_DIMENSION(d) sum = square_sum(load(p + d * stride) - all(c[d * step]), sum, d == 0);
  return sum;
}

// Squared distances of one point x to the 16 centroids of a leaf.
template <int D>
INLINE F distance_leaf(const float* x, const float* leaf, int dims) {
  F sum = all(0);
  EACH_DIMENSION(d) sum = square_sum(all(x[d]) - load(leaf + d * 16), sum, d == 0);
  return sum;
}

// Squared distances of the box [from, to] to the 16 child boxes of a node; a point is a box with from = to.
template <int D>
INLINE F distance_boxes(const float* from, const float* to, const float* low, const float* high, int dims) {
  F sum = all(0);
  EACH_DIMENSION(d) {
    F gap = max(load(low + d * 16) - all(to[d]), all(from[d]) - load(high + d * 16));
    sum = square_sum(max(gap, all(0)), sum, d == 0);
  }
  return sum;
}

INLINE const float* centroid(const Tree& t, int32_t slot) { return t.leaf + int64_t(slot >> 4) * t.D * 16 + (slot & 15); }

template <int D>
INLINE float distance_one(const float* x, const float* c, int dims) {
  float sum = 0;
  EACH_DIMENSION(d) {
    float t = x[d] - c[d * 16];
    sum = d ? fma(t, t, sum) : t * t;
  }
  return sum;
}

// ---- brute force ------------------------------------------------------------------------------------------

// 16 * G points against all centroids. Only the minimum of each leaf is kept, and which leaf won; the winner
// within it is found afterwards by computing that leaf's 16 distances once more.
template <int D, int G>
INLINE void brute_points(const Columns& x, int64_t at, int n, const Tree& t, int32_t* slot, float* distance) {
  const int dims = x.D;
  const float* p = x.data + at;
  F best[G];
  I leaf[G];
  for (int g = 0; g < G; g++) best[g] = all(__builtin_inff()), leaf[g] = every(0);
  for (int32_t j = 0; j < t.count[0]; j++) {
    const float* c = t.leaf + int64_t(j) * dims * 16;
    F least[G];
    for (int g = 0; g < G; g++) least[g] = all(__builtin_inff());
    for (int l = 0; l < 16; l++)
      for (int g = 0; g < G; g++) least[g] = min(distance_points<D>(p + 16 * g, x.stride, c + l, 16, dims), least[g]);
    for (int g = 0; g < G; g++) keep_less(least[g], every(j), best[g], leaf[g]);
  }
  float q[D ? D : 1];
  for (int g = 0; g < G; g++) {
    float b[16];
    int32_t which[16];
    store(b, best[g]), store(which, leaf[g]);
    for (int i = 0; i < 16 && 16 * g + i < n; i++) {
      const float* c = t.leaf + int64_t(which[i]) * dims * 16;
      uint32_t winners;
      if (D) {
        EACH_DIMENSION(d) q[d] = p[d * x.stride + 16 * g + i];
        winners = mask_le(distance_leaf<D>(q, c, dims), all(b[i]));
      } else {
        F sum = all(0);
        for (int d = 0; d < dims; d++) sum = square_sum(all(p[d * x.stride + 16 * g + i]) - load(c + d * 16), sum, d == 0);
        winners = mask_le(sum, all(b[i]));
      }
      slot[16 * g + i] = which[i] * 16 + __builtin_ctz(winners);
      distance[16 * g + i] = b[i];
    }
  }
}

template <int D>
void brute(const Columns& x, int64_t begin, int64_t end, const Tree& t, int32_t* slot, float* distance) {
  constexpr int G = D >= 1 && D <= 4 ? 4 : 2;
  for (int64_t i = begin; i < end; i += 16 * G) {
    int n = end - i < 16 * G ? int(end - i) : 16 * G;
    brute_points<D, G>(x, i, n, t, slot + i, distance + i);
  }
}

// ---- boxes ------------------------------------------------------------------------------------------------

// From n nodes of one level, those `until` levels down whose box is within `limit` of the box [from, to], in rising
// order. Both arrays are overwritten; returns the one that holds the answer, and n is then its length.
template <int D>
INLINE int32_t* near_nodes(const Tree& t, const float* from, const float* to, float limit, int level, int until, int32_t* now,
                           int32_t* next, int& n) {
  const int dims = t.D;
  for (; level > until; level--) {
    int m = 0;
    for (int i = 0; i < n; i++) {
      int64_t at = int64_t(now[i]) * dims * 16;
      uint32_t hit = mask_le(distance_boxes<D>(from, to, t.low[level] + at, t.high[level] + at, dims), all(limit));
      pack_lanes(next + m, now[i] * 16, hit);
      m += count(hit);
    }
    int32_t* swap = now;
    now = next, next = swap, n = m;
  }
  return now;
}

// Down the tree to the nearest child each time: a good first guess, not yet the nearest.
template <int D>
INLINE int32_t descend(const Tree& t, const float* x) {
  const int dims = t.D;
  int32_t node = 0;
  for (int level = t.top; level > 0; level--) {
    int64_t at = int64_t(node) * dims * 16;
    F gap = distance_boxes<D>(x, x, t.low[level] + at, t.high[level] + at, dims);
    node = node * 16 + __builtin_ctz(mask_le(gap, all(lowest(gap))));
  }
  F near = distance_leaf<D>(x, t.leaf + int64_t(node) * dims * 16, dims);
  return node * 16 + __builtin_ctz(mask_le(near, all(lowest(near))));
}

template <int D>
void boxes(const Columns& x, const Run& run, const Tree& t, const Scratch& s, int32_t* slot, float* distance) {
  const int dims = x.D;
  float q[D ? D : 1024];
  for (int64_t i = run.begin; i < run.end; i++) {
    EACH_DIMENSION(d) q[d] = x.data[d * x.stride + i];
    int32_t winner = run.start >= 0 ? run.start : descend<D>(t, q);
    float best = distance_one<D>(q, centroid(t, winner), dims);
    int n = 1;
    s.nodes[0] = 0;
    const int32_t* leaves = near_nodes<D>(t, q, q, best, t.top, 0, s.nodes, s.more_nodes, n);
    for (int j = 0; j < n; j++) {
      F near = distance_leaf<D>(q, t.leaf + int64_t(leaves[j]) * dims * 16, dims);
      uint32_t hit = mask_le(near, all(best));
      hit &= ~(uint32_t(leaves[j] == winner >> 4) << (winner & 15));
      if (!hit) continue;
      float b[16];
      store(b, near);
      for (; hit; hit &= hit - 1) {
        int l = __builtin_ctz(hit);
        int32_t other = leaves[j] * 16 + l;
        if (b[l] < best || (b[l] == best && t.id[other] < t.id[winner])) best = b[l], winner = other;
      }
    }
    slot[i] = winner;
    distance[i] = best;
  }
}

// ---- lists ------------------------------------------------------------------------------------------------

// 16 * G points against m listed centroids in rising order of their slots: strict < keeps the lowest of a tie.
template <int D, int G>
INLINE void scan(const Columns& x, int64_t at, int n, const float* list, int64_t step, const int32_t* id, int m,
                 int32_t* slot, float* distance) {
  const int dims = x.D;
  const float* p = x.data + at;
  F best[G];
  I which[G];
  for (int g = 0; g < G; g++) best[g] = all(__builtin_inff()), which[g] = every(0);
  for (int j = 0; j < m; j++) {
    I name = every(id[j]);
    for (int g = 0; g < G; g++)
      keep_less(distance_points<D>(p + 16 * g, x.stride, list + j, step, dims), name, best[g], which[g]);
  }
  for (int g = 0; g < G; g++) {
    if (16 * g + 16 <= n) {
      store(distance + 16 * g, best[g]), store(slot + 16 * g, which[g]);
    } else if (16 * g < n) {
      float b[16];
      int32_t w[16];
      store(b, best[g]), store(w, which[g]);
      memcpy(distance + 16 * g, b, 4 * (n - 16 * g)), memcpy(slot + 16 * g, w, 4 * (n - 16 * g));
    }
  }
}

// If x in run r has centroid c_start at distance u, a centroid c that is as near has |c - c_start| <= 2u.
// So all points of the run look at the same list: the centroids within twice its radius. The factor and the
// term added cover float32 rounding and underflow.
INLINE float ball(float radius2, int dims) { return 4 * radius2 * (1 + 1e-6f * float(dims + 8)) + 1e-36f; }

template <int D>
void lists(const Columns& x, const Run* run, int runs, const Tree& t, const Scratch& s, int32_t* slot, float* distance) {
  const int dims = x.D;
  constexpr int G = D >= 1 && D <= 4 ? 4 : 2;
  float from[D ? D : 1024], to[D ? D : 1024], radius2[16], widest = 0;
  EACH_DIMENSION(d) from[d] = __builtin_inff(), to[d] = -__builtin_inff();
  for (int r = 0; r < runs; r++) {
    const float* c = centroid(t, run[r].start);
    F far = all(0);
    int64_t i = run[r].begin;
    for (; i + 16 <= run[r].end; i += 16) far = max(far, distance_points<D>(x.data + i, x.stride, c, 16, dims));
    radius2[r] = highest(far);
    if (i < run[r].end) {
      float b[16];
      store(b, distance_points<D>(x.data + i, x.stride, c, 16, dims));
      for (int l = 0; l < run[r].end - i; l++) radius2[r] = b[l] > radius2[r] ? b[l] : radius2[r];
    }
    widest = radius2[r] > widest ? radius2[r] : widest;
    EACH_DIMENSION(d) {
      float v = c[d * 16];
      from[d] = v < from[d] ? v : from[d], to[d] = v > to[d] ? v : to[d];
    }
  }
  // For all runs together down to the nodes above the leaves; from there for each run by itself.
  const int above = t.top < 1 ? t.top : 1;
  int groups = 1;
  s.nodes[0] = 0;
  int32_t* group = near_nodes<D>(t, from, to, ball(widest, dims), t.top, above, s.nodes, s.more_nodes, groups);
  const int64_t step = int64_t(t.count[0] + 1) * 16;
  for (int r = 0; r < runs; r++) {
    float q[D ? D : 1024];
    EACH_DIMENSION(d) q[d] = centroid(t, run[r].start)[d * 16];
    const F limit = all(ball(radius2[r], dims));
    int m = 0, n = 0;
    const int32_t* leaves = group;
    if (above == 0) n = 1;
    for (int g = 0; g < groups && above == 1; g++) {
      int64_t at = int64_t(group[g]) * dims * 16;
      uint32_t hit = mask_le(distance_boxes<D>(q, q, t.low[1] + at, t.high[1] + at, dims), limit);
      pack_lanes(s.leaves + n, group[g] * 16, hit);
      n += count(hit), leaves = s.leaves;
    }
    for (int j = 0; j < n; j++) {
      const float* leaf = t.leaf + int64_t(leaves[j]) * dims * 16;
      uint32_t hit = mask_le(distance_leaf<D>(q, leaf, dims), limit);
      if (!hit) continue;
      EACH_DIMENSION(d) pack(s.list + d * step + m, load(leaf + d * 16), hit);
      pack_lanes(s.list_id + m, leaves[j] * 16, hit);
      m += count(hit);
    }
    for (int64_t i = run[r].begin; i < run[r].end;) {
      int64_t left = run[r].end - i;
      if (G == 4 && left > 32) scan<D, G>(x, i, left < 64 ? int(left) : 64, s.list, step, s.list_id, m, slot + i, distance + i), i += 64;
      else if (left > 16) scan<D, 2>(x, i, left < 32 ? int(left) : 32, s.list, step, s.list_id, m, slot + i, distance + i), i += 32;
      else scan<D, 1>(x, i, int(left), s.list, step, s.list_id, m, slot + i, distance + i), i += 16;
    }
  }
}

// ---- sums and splits --------------------------------------------------------------------------------------

// Sixteen double lanes; sums are formed lane by lane, then lane 0 + lane 1 + ..., so they are the same on every machine.
constexpr int H = W / 2;
typedef double vd __attribute__((vector_size(4 * W)));
typedef float vh __attribute__((vector_size(2 * W)));
struct Sum { vd p[16 / H]; };
INLINE Sum nothing() { Sum r; for (int i = 0; i < 16 / H; i++) r.p[i] = vd{}; return r; }
INLINE Sum widen(const float* a) {
  Sum r;
  for (int i = 0; i < 16 / H; i++) {
    vh x;
    memcpy(&x, a + i * H, sizeof x);
    r.p[i] = __builtin_convertvector(x, vd);
  }
  return r;
}
INLINE void add(Sum& s, const Sum& a) { for (int i = 0; i < 16 / H; i++) s.p[i] += a.p[i]; }
INLINE void add_product(Sum& s, const Sum& a, const Sum& b) { for (int i = 0; i < 16 / H; i++) s.p[i] += a.p[i] * b.p[i]; }
INLINE Sum product(const Sum& a, const Sum& b) { Sum r; for (int i = 0; i < 16 / H; i++) r.p[i] = a.p[i] * b.p[i]; return r; }
INLINE double total(const Sum& s) { double b[16], t; memcpy(b, &s, 128); t = b[0]; for (int i = 1; i < 16; i++) t += b[i]; return t; }

// The n < 16 floats at a, and zeros: the tail of a run.
INLINE Sum widen_tail(const float* a, int n) { float b[16] = {0}; memcpy(b, a, 4 * n); return widen(b); }

void moments(const Columns& x, int64_t begin, int64_t end, double* out) {
  const int64_t whole = begin + (end - begin) / 16 * 16;
  const int tail = int(end - whole);
  const float* w = x.weight();
  out[0] = double(end - begin);
  if (w) {
    Sum s = nothing();
    for (int64_t i = begin; i < whole; i += 16) add(s, widen(w + i));
    add(s, widen_tail(w + whole, tail));
    out[0] = total(s);
  }
  for (int d = 0; d < x.D; d++) {
    const float* p = x.row(d);
    Sum s = nothing(), q = nothing();
    for (int64_t i = begin; i < whole; i += 16) {
      Sum v = widen(p + i), wv = w ? product(v, widen(w + i)) : v;
      add(s, wv), add_product(q, wv, v);
    }
    Sum v = widen_tail(p + whole, tail), wv = w ? product(v, widen_tail(w + whole, tail)) : v;
    add(s, wv), add_product(q, wv, v);
    out[1 + d] = total(s), out[1 + x.D + d] = total(q);
  }
}

double weighted_total(const Columns& x, int64_t begin, int64_t end, const float* distance) {
  const int64_t whole = begin + (end - begin) / 16 * 16;
  const float* w = x.weight();
  Sum s = nothing();
  for (int64_t i = begin; i < whole; i += 16) {
    Sum v = widen(distance + i - begin);
    add(s, w ? product(v, widen(w + i)) : v);
  }
  Sum v = widen_tail(distance + whole - begin, int(end - whole));
  add(s, w ? product(v, widen_tail(w + whole, int(end - whole))) : v);
  return total(s);
}

INLINE uint32_t lanes(int64_t left) { return left >= 16 ? 0xffff : (1u << left) - 1; }

int64_t count_low(const Columns& x, int64_t begin, int64_t end, int axis, float threshold) {
  int64_t n = 0;
  for (int64_t i = begin; i < end; i += 16)
    n += count(mask_le(load(x.row(axis) + i), all(threshold)) & lanes(end - i));
  return n;
}

void split(const Columns& from, const Columns& to, int64_t begin, int64_t end, int axis, float threshold, int64_t low,
           int64_t high) {
  for (int64_t i = begin; i < end; i += 16) {
    uint32_t all_of_them = lanes(end - i);
    uint32_t left = mask_le(load(from.row(axis) + i), all(threshold)) & all_of_them, right = all_of_them & ~left;
    for (int d = 0; d < from.rows(); d++) {
      F v = load(from.row(d) + i);
      pack_exactly(to.row(d) + low, v, left), pack_exactly(to.row(d) + high, v, right);
    }
    low += count(left), high += count(right);
  }
}

void subtract(float* y, const float* x, float a, int64_t n) {
  const int64_t whole = n / W * W;
  const vf factor = vf{} + a;
  for (int64_t i = 0; i < whole; i += W) {
    vf v, u;
    memcpy(&v, y + i, sizeof v), memcpy(&u, x + i, sizeof u);
    v -= factor * u;
    memcpy(y + i, &v, sizeof v);
  }
  for (int64_t i = whole; i < n; i++) y[i] -= a * x[i];
}

// ---- choice of D ------------------------------------------------------------------------------------------

#define CHOOSE(D_, call) \
  switch (D_) { \
    case 1: call(1); break;   case 2: call(2); break;   case 3: call(3); break;   case 4: call(4); break; \
    case 5: call(5); break;   case 6: call(6); break;   case 7: call(7); break;   case 8: call(8); break; \
    case 9: call(9); break;   case 10: call(10); break; case 11: call(11); break; case 12: call(12); break; \
    case 13: call(13); break; case 14: call(14); break; case 15: call(15); break; case 16: call(16); break; \
    default: call(0); \
  }

void any_brute(const Columns& x, int64_t begin, int64_t end, const Tree& t, int32_t* slot, float* distance) {
#define CALL(D) brute<D>(x, begin, end, t, slot, distance)
  CHOOSE(x.D, CALL)
#undef CALL
}
void any_boxes(const Columns& x, const Run& run, const Tree& t, const Scratch& s, int32_t* slot, float* distance) {
#define CALL(D) boxes<D>(x, run, t, s, slot, distance)
  CHOOSE(x.D, CALL)
#undef CALL
}
void any_lists(const Columns& x, const Run* run, int runs, const Tree& t, const Scratch& s, int32_t* slot, float* distance) {
#define CALL(D) lists<D>(x, run, runs, t, s, slot, distance)
  CHOOSE(x.D, CALL)
#undef CALL
}

extern const Tiles table;
const Tiles table = {NAME(CLUSCOMP_ISA), any_brute, any_boxes, any_lists, moments, weighted_total, count_low, split, subtract};

}  // namespace CLUSCOMP_ISA
