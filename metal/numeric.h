#pragma once

#include <metal_stdlib>

// The oracles round after every operation, so no multiplication may be fused with an addition:
// "safe" alone would allow that within a statement.
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)

namespace milpress {

/// Threads of a simdgroup. The host refuses a device on which they are not so many.
constant constexpr uint kSimdWidth = 32;

/// The bits of the absolute value: they order as magnitudes do, NaN above infinity.
inline uint magnitude_bits(float value) { return as_type<uint>(value) & 0x7fffffffu; }

inline uint magnitude_bits(half value) { return as_type<ushort>(value) & 0x7fffu; }

/// Integers that order as the values do: -NaN < -inf < ... < -0 < +0 < ... < +inf < +NaN.
inline int order_key(float value) {
  const int bits = as_type<int>(value);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

/// The inverse of `order_key`.
inline float value_at(int key) { return as_type<float>(key ^ ((key >> 31) & 0x7fffffff)); }

inline bool is_finite(float value) { return magnitude_bits(value) < 0x7f800000u; }

/// `value` rounded to the precision of `T`, as a float; NaN is what `core/half.h` makes of it.
template <typename T>
inline float round_to(float value) {
  return float(T(value));
}

/// Largest finite `T`, smallest that is not subnormal, and what it adds to an error: half a last
/// place relatively (and what floats add), half the spacing of subnormals absolutely.
template <typename T>
struct Limits;

template <>
struct Limits<half> {
  static constexpr constant float kMax = 65504.0f;
  static constexpr constant float kSmallestNormal = 0x1p-14f;
  static constexpr constant float kHalfPlace = 0x1.01p-11f;
  static constexpr constant float kSubnormal = 0x1p-25f;
};

template <>
struct Limits<float> {
  static constexpr constant float kMax = 0x1.fffffep127f;
  static constexpr constant float kSmallestNormal = 0x1p-126f;
  static constexpr constant float kHalfPlace = 0x1.01p-24f;
  static constexpr constant float kSubnormal = 0x1p-149f;
};

/// The sum of `value` over the threads of the group that come before this one. `totals` has a place
/// for each simdgroup, and holds what each of them adds once this returns.
inline uint sum_before(uint value, threadgroup uint* totals, uint lane, uint simdgroup) {
  const uint in_simdgroup = metal::simd_prefix_exclusive_sum(value);
  if (lane == kSimdWidth - 1) {
    totals[simdgroup] = in_simdgroup + value;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  uint sum = in_simdgroup;
  for (uint i = 0; i < simdgroup; ++i) {
    sum += totals[i];
  }
  return sum;
}

/// A bit for each thread of the simdgroup, lane 0 in the lowest.
inline uint ballot(bool vote) {
  return uint(static_cast<metal::simd_vote::vote_t>(metal::simd_ballot(vote)));
}

}  // namespace milpress
