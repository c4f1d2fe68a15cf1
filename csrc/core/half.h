#pragma once

#include <bit>
#include <cstdint>

namespace milpress {

/// IEEE 754 binary16, as stored. Arithmetic is done in `float`; see `to_float` and `to_half`.
struct Half {
  std::uint16_t bits = 0;

  friend constexpr bool operator==(Half, Half) = default;
};
static_assert(sizeof(Half) == 2);

/// The value of `half`, exactly. Branch-free, so that loops over it vectorise; NaN stays NaN.
constexpr float to_float(Half half) {
  constexpr std::uint32_t kExponent = 0x0f800000;
  constexpr std::uint32_t kSmallestNormal = 113U << 23;
  const std::uint32_t magnitude = (half.bits & 0x7fffU) << 13;
  const std::uint32_t exponent = magnitude & kExponent;
  // A subnormal becomes normal under an added exponent that is subtracted again as a float.
  const float subnormal =
      std::bit_cast<float>(magnitude + kSmallestNormal) - std::bit_cast<float>(kSmallestNormal);
  std::uint32_t bits = magnitude + (exponent == kExponent ? 224U << 23 : 112U << 23);
  bits = exponent == 0 ? std::bit_cast<std::uint32_t>(subnormal) : bits;
  return std::bit_cast<float>(bits | (half.bits & 0x8000U) << 16);
}

constexpr float to_float(float value) { return value; }

/// `value` rounded to the nearest half, ties to even; overflow gives infinity, NaN a quiet NaN.
constexpr Half to_half(float value) {
  constexpr std::uint32_t kInfinity = 255U << 23;
  constexpr std::uint32_t kOverflow = 143U << 23;        // 2^16
  constexpr std::uint32_t kSmallestNormal = 113U << 23;  // 2^-14
  constexpr std::uint32_t kSubnormalMagic = 126U << 23;  // its last bit weighs 2^-24
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  const std::uint32_t special = magnitude > kInfinity ? 0x7e00U : 0x7c00U;
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) +
                                   std::bit_cast<float>(kSubnormalMagic)) -
      kSubnormalMagic;
  const std::uint32_t odd = (magnitude >> 13) & 1U;
  std::uint32_t half = (magnitude - (112U << 23) + 0xfffU + odd) >> 13;
  half = magnitude < kSmallestNormal ? subnormal : half;
  half = magnitude >= kOverflow ? special : half;
  return Half{static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000U))};
}

/// `value` rounded to the precision of `T`, as a float.
template <typename T>
constexpr float round_to(float value) {
  return value;
}

template <>
constexpr float round_to<Half>(float value) {
  return to_float(to_half(value));
}

/// `value` rounded to the nearest `T`; the inverse of `to_float`.
template <typename T>
constexpr T from_float(float value) {
  return value;
}

template <>
constexpr Half from_float<Half>(float value) {
  return to_half(value);
}

}  // namespace milpress
