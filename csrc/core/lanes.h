#pragma once

#include <array>
#include <cstddef>

namespace milpress {

/// The sum of what was added up side by side. Pairs are added, then pairs of pairs: as fast as it
/// is fixed in its order.
template <typename Sum, std::size_t kLanes>
[[gnu::always_inline]] inline Sum sum_lanes(std::array<Sum, kLanes>& lanes) {
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

}  // namespace milpress
