#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/half.h"

namespace milpress {

/// Distinct values in ascending order, each with the total importance of the weights that have it.
/// Neighbours that stay together can be a clump, which has their mean as its value.
struct WeightedValues {
  std::vector<double> values;
  std::vector<double> weights;  // > 0
  std::vector<double> spreads;  // squared errors of clumps around their means; empty if all are 0

  double spread(std::size_t i) const { return spreads.empty() ? 0 : spreads[i]; }
};

/// The distinct finite values of `weights` and how many weights have each; both zeros are one
/// value.
WeightedValues value_counts(std::span<const Half> weights);

/// Finds the distinct finite values of one row after another, and the importance of each; those
/// without any are left out. No importance at all counts as 1 each.
class DistinctValues {
 public:
  WeightedValues of(std::span<const float> weights, std::span<const float> importance);
  WeightedValues of(std::span<const Half> weights, std::span<const float> importance);

 private:
  template <typename Bin, typename Share>
  WeightedValues collect(std::span<const Half> weights, std::vector<Bin>& bins,
                         const Share& share_of);

  // The total importance of each half of a row, in the order of their values, and a bit for each
  // bin and for each word of bits that isn't zero. All zero between two rows.
  std::vector<std::uint32_t> counts_;
  std::vector<double> totals_;
  std::vector<std::uint64_t> occupied_;
};

}  // namespace milpress
