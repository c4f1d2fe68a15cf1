#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

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

template <typename T>
using Magnitude = decltype(magnitude_bits(T{}));

template <typename T>
constexpr Magnitude<T> kInfinityBits = sizeof(T) == 2 ? 0x7c00 : 0x7f800000;

/// The absolute value that has these bits, as a float.
template <typename T>
constexpr float magnitude_at(Magnitude<T> bits) {
  return to_float(std::bit_cast<T>(bits));
}

template <typename T>
using Key = decltype(order_key(T{}));

/// Integers that compare as the values do: both zeros are 0, NaN is below everything.
template <typename T>
constexpr Key<T> compare_key(T value) {
  const Magnitude<T> magnitude = magnitude_bits(value);
  const auto positive = static_cast<Key<T>>(magnitude);
  const bool is_positive = std::bit_cast<Magnitude<T>>(value) == magnitude;
  const Key<T> key = is_positive ? positive : static_cast<Key<T>>(-positive);
  return magnitude > kInfinityBits<T> ? std::numeric_limits<Key<T>>::min() : key;
}

/// The inverse, of keys that are not those of NaN.
template <typename T>
constexpr float value_of(Key<T> key) {
  return key < 0 ? -magnitude_at<T>(static_cast<Magnitude<T>>(-key))
                 : magnitude_at<T>(static_cast<Magnitude<T>>(key));
}

/// The key of the largest `T` that is at most `limit`.
template <typename T>
constexpr Key<T> key_up_to(float limit) {
  const T rounded = from_float<T>(limit);
  return static_cast<Key<T>>(compare_key(rounded) - (to_float(rounded) > limit ? 1 : 0));
}

}  // namespace milpress
