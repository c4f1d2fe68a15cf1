#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

namespace milpress {

/// Asks for `count` elements from `begin` on, as far as there are any, to be brought into the
/// cache. A kernel that computes much on a chunk asks for the next one first: what the processor
/// guesses comes too late for it. Kernels that mostly move memory gain nothing (docs/design.md).
template <typename T>
inline void prefetch(std::span<const T> elements, std::size_t begin, std::size_t count) {
  constexpr std::size_t kLine = 64 / sizeof(T);
  const std::size_t end = std::min(elements.size(), begin + count);
  for (; begin < end; begin += kLine) {
    __builtin_prefetch(elements.data() + begin);
  }
}

}  // namespace milpress
