#pragma once

#include <bit>
#include <cstdint>

#include "core/half.h"

namespace milpress {

/// Integers that order as the values do, so that minima and maxima vectorise without giving up on
/// NaN: -NaN < -inf < ... < -0 < +0 < ... < +inf < +NaN. `value_at` is the inverse.
constexpr std::int16_t order_key(Half value) {
  const auto bits = static_cast<std::int16_t>(value.bits);
  return static_cast<std::int16_t>(bits ^ ((bits >> 15) & 0x7fff));
}

constexpr std::int32_t order_key(float value) {
  const auto bits = std::bit_cast<std::int32_t>(value);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

constexpr Half value_at(std::int16_t key) {
  return Half{static_cast<std::uint16_t>(key ^ ((key >> 15) & 0x7fff))};
}

constexpr float value_at(std::int32_t key) {
  return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff));
}

/// The bits of the absolute value: they order as magnitudes do, NaN above infinity.
constexpr std::uint16_t magnitude_bits(Half value) {
  return static_cast<std::uint16_t>(value.bits & 0x7fffU);
}

constexpr std::uint32_t magnitude_bits(float value) {
  return std::bit_cast<std::uint32_t>(value) & 0x7fffffffU;
}

}  // namespace milpress
