#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "kernels/value_counts.h"

namespace milpress {

/// Where clusters of single values can begin and end, as found from clumps of these values.
struct Outline {
  std::vector<bool>
      may_be_cut;      // for each clump, whether a cluster may begin or end in it, or beside
  double penalty = 0;  // of a cluster, in the Lagrangian
};

/// The ends of the `k` clusters of least squared error: cluster j is
/// `[ends[j - 1], ends[j])`, with 0 before the first; the last end is the number of values.
/// Fewer than `k` values give one cluster each.
///
/// Lagrangian search over a concave least-weight subsequence: Groenlund et al. 2017, "Fast Exact
/// k-Means, k-Medians and Bregman Divergence Clustering in 1D" (arXiv 1701.07204), section 4.
/// Rows of one weight resemble each other, so a row's search starts at the last one's penalty.
class ClusterSearch {
 public:
  ClusterSearch();
  ~ClusterSearch();

  std::vector<std::size_t> best(const WeightedValues& data, std::size_t k);

  /// The same, from a penalty that is known to be near.
  std::vector<std::size_t> best(const WeightedValues& data, std::size_t k, double penalty);

  /// What clumps tell of the best `k` clusters of the single values in them. `range` is the
  /// distance from the least of those values to the greatest.
  Outline outline(const WeightedValues& clumps, std::size_t k, double range);

 private:
  struct State;

  std::unique_ptr<State> state_;
};

/// The same by divide and conquer over the dynamic program, O(k n log n) time and O(k n) memory:
/// the oracle, and the way for one or two clusters. Exposed for testing.
std::vector<std::size_t> optimal_clusters_by_dynamic_program(const WeightedValues& data,
                                                             std::size_t k);

/// The mean of the values [begin, end).
double mean_of(const WeightedValues& data, std::size_t begin, std::size_t end);

/// `sum_i weight_i * (value_i - mean of its cluster)^2`, in a numerically careful two-pass way.
double squared_error(const WeightedValues& data, std::span<const std::size_t> ends);

}  // namespace milpress
