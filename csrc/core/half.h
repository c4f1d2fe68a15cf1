#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

namespace milpress {

/// IEEE 754 binary16, as stored. Arithmetic is done in `float`; see `to_float` and `to_half`.
struct Half {
  std::uint16_t bits = 0;

  friend constexpr bool operator==(Half, Half) = default;
};
static_assert(sizeof(Half) == 2);

/// `to_float` by integer arithmetic: the oracle, and the way where the processor has none.
/// Branch-free, so that loops over it vectorise.
constexpr float to_float_plain(Half half) {
  constexpr std::uint32_t kInfinity = 31U << 23;         // a half's exponent, moved to a float's
  constexpr std::uint32_t kSmallestNormal = 113U << 23;  // 2^-14
  constexpr std::uint32_t kQuiet = 1U << 22;
  const std::uint32_t magnitude = (half.bits & 0x7fffU) << 13;
  // A subnormal becomes normal under an added exponent that is subtracted again as a float.
  const float subnormal =
      std::bit_cast<float>(magnitude + kSmallestNormal) - std::bit_cast<float>(kSmallestNormal);
  std::uint32_t bits = magnitude + (magnitude >= kInfinity ? 224U << 23 : 112U << 23);
  bits = magnitude < 1U << 23 ? std::bit_cast<std::uint32_t>(subnormal) : bits;
  bits |= magnitude > kInfinity ? kQuiet : 0U;
  return std::bit_cast<float>(bits | (half.bits & 0x8000U) << 16);
}

/// `to_half` by integer arithmetic: the oracle, and the way where the processor has none.
constexpr Half to_half_plain(float value) {
  constexpr std::uint32_t kInfinity = 255U << 23;
  constexpr std::uint32_t kOverflow = 143U << 23;        // 2^16
  constexpr std::uint32_t kSmallestNormal = 113U << 23;  // 2^-14
  constexpr std::uint32_t kSubnormalMagic = 126U << 23;  // its last bit weighs 2^-24
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  const std::uint32_t nan = 0x7e00U | (magnitude >> 13 & 0x3ffU);
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) +
                                   std::bit_cast<float>(kSubnormalMagic)) -
      kSubnormalMagic;
  const std::uint32_t odd = (magnitude >> 13) & 1U;
  std::uint32_t half = (magnitude - (112U << 23) + 0xfffU + odd) >> 13;
  half = magnitude < kSmallestNormal ? subnormal : half;
  half = magnitude >= kOverflow ? 0x7c00U : half;
  half = magnitude > kInfinity ? nan : half;
  return Half{static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000U))};
}

/// The value of `half`, exactly. A NaN keeps sign and payload and becomes quiet.
///
/// One instruction on arm64, and in loops one for four halves. x86-64 has such instructions only
/// beyond its baseline: arrays are faster through `widen` and `narrow` (core/convert.h).
constexpr float to_float(Half half) {
#if defined(__aarch64__)
  if (!std::is_constant_evaluated()) {
    return static_cast<float>(std::bit_cast<__fp16>(half.bits));
  }
#endif
  return to_float_plain(half);
}

constexpr float to_float(float value) { return value; }

/// `value` rounded to the nearest half, ties to even. From 65,520 on it is infinity. A NaN keeps
/// its sign and the upper ten bits of its payload, and becomes quiet.
constexpr Half to_half(float value) {
#if defined(__aarch64__)
  if (!std::is_constant_evaluated()) {
    return Half{std::bit_cast<std::uint16_t>(static_cast<__fp16>(value))};
  }
#endif
  return to_half_plain(value);
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
