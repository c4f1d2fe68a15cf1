#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "core/half.h"
#include "core/matrix.h"

namespace milpress {

/// Writes to each row of `luts` the 2^b table entries that minimise
/// `sum_i importance_i * (weight_i - nearest entry)^2` over the same row of `weights`, exactly.
///
/// The optimum is found among the distinct values in double precision, its means are rounded to
/// `T`, and table and assignment are then improved in turn until neither changes, so that the
/// rounded table is never worse than the rounded means. Entries ascend. A row with fewer distinct
/// values than entries gets them all, the last one repeated; an empty row gets zeros.
///
/// `importance` has the shape of `weights`, finite and not negative, or no rows at all for equal
/// importance; a row whose importance is all zero counts as equal. Weights that are not finite are
/// ignored. The result does not depend on the core count; where several tables are optimal, the
/// rows before may decide which one a row gets.
template <typename T>
void kmeans1d(MatrixView<const T> weights, MatrixView<const float> importance, MatrixView<T> luts);

/// Distinct values in ascending order, each with the total importance of the weights that have it.
struct WeightedValues {
  std::vector<double> values;
  std::vector<double> weights;  // > 0
};

/// The distinct finite values of `weights` and how many weights have each; both zeros are one
/// value.
WeightedValues value_counts(std::span<const Half> weights);

/// The ends of the `k` clusters of least squared error: cluster j is
/// `[ends[j - 1], ends[j])`, with 0 before the first; the last end is the number of values.
/// Fewer than `k` values give one cluster each. Exposed for testing.
///
/// Lagrangian search over a concave least-weight subsequence: Groenlund et al. 2017, "Fast Exact
/// k-Means, k-Medians and Bregman Divergence Clustering in 1D" (arXiv 1701.07204), section 4.
std::vector<std::size_t> optimal_clusters(const WeightedValues& data, std::size_t k);

/// The same by divide and conquer over the dynamic program, O(k n log n) time and O(k n) memory:
/// the oracle, and the way for one or two clusters.
std::vector<std::size_t> optimal_clusters_by_dynamic_program(const WeightedValues& data,
                                                             std::size_t k);

/// `sum_i weight_i * (value_i - mean of its cluster)^2`, in a numerically careful two-pass way.
double squared_error(const WeightedValues& data, std::span<const std::size_t> ends);

}  // namespace milpress
