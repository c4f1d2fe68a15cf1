#include "kernels/finite.h"

#include <algorithm>

#include "core/keys.h"
#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr std::size_t kChunk = 4096;

template <typename T>
MILPRESS_VECTORIZE auto greatest_magnitude(const T* weights, std::size_t n) {
  auto greatest = magnitude_bits(T{});
  for (std::size_t i = 0; i < n; ++i) {
    const auto bits = magnitude_bits(weights[i]);
    greatest = bits > greatest ? bits : greatest;
  }
  return greatest;
}

}  // namespace

template <typename T>
std::size_t first_nonfinite(std::span<const T> weights) {
  for (std::size_t begin = 0; begin < weights.size(); begin += kChunk) {
    const auto chunk = weights.subspan(begin, std::min(kChunk, weights.size() - begin));
    if (greatest_magnitude(chunk.data(), chunk.size()) >= kInfinityBits<T>) {
      const auto found = std::find_if(chunk.begin(), chunk.end(), [](T weight) {
        return magnitude_bits(weight) >= kInfinityBits<T>;
      });
      return begin + static_cast<std::size_t>(found - chunk.begin());
    }
  }
  return weights.size();
}

template std::size_t first_nonfinite(std::span<const Half>);
template std::size_t first_nonfinite(std::span<const float>);

}  // namespace milpress
