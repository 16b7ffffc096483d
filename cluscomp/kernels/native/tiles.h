// The inner loops (tiles), compiled once per instruction set and chosen at run time, and the two layouts they read.
// Plain structs and pointers only: see simd.h for why.
#pragma once
#include <stdint.h>

// Points in columns. Row d < D holds coordinate d of every point; then, where weighted, a row of weights; the last
// row holds the point's number in the caller's array (int32 bits). Rows are `stride` floats apart with at least
// 64 floats of slack after the last point, so sixteen-lane loads may run past the end.
struct Columns {
  float* data;
  int64_t stride, n;
  int D, weighted;
  float* row(int d) const { return data + d * stride; }
  float* weight() const { return weighted ? row(D) : nullptr; }
  int rows() const { return D + weighted + 1; }
  int32_t* number() const { return reinterpret_cast<int32_t*>(row(D + weighted)); }
};

// Centroids in blocks of 16 (a leaf), and boxes around blocks of 16 leaves, of 16 of those, ... up to one root.
// Coordinates of a block are stored coordinate by coordinate, 16 lanes each; empty lanes hold infinities.
struct Tree {
  int D, K, top;       // top: level of the root; level 0 are the leaves
  int count[9];        // nodes on each level
  float* leaf;         // (count[0], D, 16) centroids
  float* low[9];       // low[l], high[l]: (count[l], D, 16) boxes of the 16 children of each node of level l >= 1
  float* high[9];
  const int32_t* id;   // the caller's number of the centroid in each slot; the lowest wins a tie
};

// A run of points [begin, end) that is searched starting from the centroid in slot `start` (-1: none known).
struct Run {
  int64_t begin, end;
  int32_t start;
};

// What one worker needs for a search; sizes in lloyd.cpp.
struct Scratch {
  int32_t *nodes, *more_nodes, *leaves, *list_id;
  float* list;
};

struct Tiles {
  const char* name;
  // Nearest centroid of points [begin, end): all distances. Writes slots and squared distances.
  void (*brute)(const Columns&, int64_t begin, int64_t end, const Tree&, int32_t* slot, float* distance);
  // The same, point by point, visiting only the leaves whose box is not farther than the best centroid so far.
  void (*boxes)(const Columns&, const Run&, const Tree&, const Scratch&, int32_t* slot, float* distance);
  // The same for runs that start in one leaf, sixteen points at a time, against the list of all centroids
  // within twice the run's radius. Needs id = slot.
  void (*lists)(const Columns&, const Run*, int runs, const Tree&, const Scratch&, int32_t* slot, float* distance);
  // out[0] = sum of weights, then D sums of w x, then D sums of w x^2.
  void (*moments)(const Columns&, int64_t begin, int64_t end, double* out);
  // Sum of weight * distance[i - begin] over [begin, end).
  double (*total)(const Columns&, int64_t begin, int64_t end, const float* distance);
  // Number of points in [begin, end) with coordinate `axis` <= threshold.
  int64_t (*count_low)(const Columns&, int64_t begin, int64_t end, int axis, float threshold);
  // Stable split of [begin, end) of `from`: low ones to `to` starting at `low`, the others starting at `high`.
  void (*split)(const Columns& from, const Columns& to, int64_t begin, int64_t end, int axis, float threshold,
                int64_t low, int64_t high);
  // y -= a x for n numbers; product and difference are rounded one after the other.
  void (*subtract)(float* y, const float* x, float a, int64_t n);
};

const Tiles& tiles();                       // the best set for this machine
const Tiles* tiles_named(const char* name); // "avx512", "avx2", "base"; null where the machine lacks it
