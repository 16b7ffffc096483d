// Exact K-means: assignment of points to centroids, and Lloyd's iteration around it.
#pragma once
#include <functional>
#include <vector>

#include "points.h"
#include "tree.h"

struct Rounds;  // feedback.h

enum class Search { choose, brute, lists, boxes };

// The fastest search for these sizes (measured: benchmarks/kmeans.py --search). All of them are exact.
Search fastest_search(int D, int K, bool warm);

struct LloydSettings {
  int K = 1, iterations = 20;
  bool kd = true;             // kd split as the first codebook; else `first` holds it
  bool move_centroids = true; // centroids of empty clusters go to the worst ones; else faiss' rule
  float over_relaxation = 1;  // new = old + over_relaxation * (mean - old); 1 in the last three iterations
  uint64_t seed = 0;
  Search search = Search::choose;
  std::vector<float> first;   // (K, D), where kd is false
  std::function<void(int, double)> progress;  // (assignments done, inertia)
};

struct LloydResult {
  std::vector<float> centroids;  // (K, D), in spatial order
  std::vector<double> inertia;   // sum of weight * squared distance at each assignment; iterations + 1 of them
};

// Clusters the points held by `cloud`; codes_N is indexed by the caller's numbering. The points are reordered.
LloydResult lloyd(const Cloud& cloud, const LloydSettings&, int32_t* codes_N, const Tiles&, const Workers&);

// Centroids made ready for searches; the lowest number wins a tie.
class Index {
 public:
  // `order`: the centroid of each slot, if a spatial order is known (that of other centroids that lie alike will do: what is
  // found does not depend on it), or null.
  Index(const float* centroids_KD, int K, int D, Search, const int32_t* order, const Workers&);
  const float* centroid(int32_t code) const { return &centroids_[int64_t(code) * D]; }
  // Codes of the points (not reordered) and the squared distances to their centroids.
  void search(const Columns&, int32_t* codes_N, float* distances_N, const Tiles&, const Workers&) const;
  const int K, D;

 private:
  friend void feedback(const Index&, const Rounds&, const Tiles&, const Workers&);
  Search search_;
  std::vector<float> centroids_;
  std::vector<int32_t> order_;  // the code of the centroid in each slot; empty: the slot itself
  CentroidTree tree_;
};
