#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/value_counts.h"

namespace milpress {

/// Maps values to buckets so that their order is kept. Buckets have about the same size within
/// `width` of the centre and grow with the distance beyond.
struct BucketScale {
  float centre = 0;
  float width = 1;
  float n_steps = 1;        // buckets from the centre to infinity, were there so many
  std::int32_t n_half = 1;  // buckets on either side, which reach to the farthest value
};

/// The values of a long row in ascending buckets, which takes less than sorting them.
///
/// Values without importance are left out; no importance at all counts as 1 each. Where a value is
/// not finite, there are no buckets. The row must outlive them.
class ValueBuckets {
 public:
  ValueBuckets(std::span<const float> weights, std::span<const float> importance,
               std::size_t n_buckets);

  /// Each bucket that isn't empty, as a clump.
  const WeightedValues& clumps() const { return clumps_; }

  /// The distance from the least value to the greatest.
  double range() const { return range_; }

  /// The values of those clumps that `is_open` one by one, and neighbours that aren't as one clump.
  WeightedValues opened(const std::vector<bool>& is_open) const;

 private:
  std::span<const float> weights_;
  std::span<const float> importance_;
  double range_ = 0;
  BucketScale scale_;
  WeightedValues clumps_;
  std::vector<std::uint32_t> clump_of_;  // the position of a bucket's clump
};

}  // namespace milpress
