#pragma once

#include <metal_stdlib>

namespace milpress {

/// A number of IEEE binary64, computed with integers, since the GPU has none: the oracles add up in
/// double. Rounds to nearest, ties to even. Operands and results must be zero or normal; sums and
/// products of a few floats always are.
struct Float64 {
  ulong bits;
};

constant constexpr ulong kSignBit = 1ul << 63;
constant constexpr ulong kImplicitBit = 1ul << 52;
constant constexpr uint kExponentBias = 1023;

inline uint exponent_of(Float64 value) { return uint(value.bits >> 52) & 0x7ff; }

inline ulong significand_of(Float64 value) {
  return (value.bits & (kImplicitBit - 1)) | kImplicitBit;
}

inline bool is_zero(Float64 value) { return value.bits << 1 == 0; }

inline Float64 operator-(Float64 value) { return Float64{value.bits ^ kSignBit}; }

/// Puts a value together from a significand with three more bits, the last of which stands for all
/// that was shifted out.
inline Float64 rounded(ulong sign, uint exponent, ulong significand) {
  const uint rest = uint(significand) & 7;
  ulong kept = significand >> 3;
  kept += rest > 4 || (rest == 4 && (kept & 1) != 0) ? 1 : 0;
  // The implicit bit raises the exponent by one, and so does a carry out of the fraction.
  return Float64{sign | ((ulong(exponent - 1) << 52) + kept)};
}

inline Float64 operator+(Float64 a, Float64 b) {
  if (a.bits << 1 < b.bits << 1) {
    const Float64 larger = b;
    b = a;
    a = larger;
  }
  if (is_zero(b)) {
    return is_zero(a) ? Float64{a.bits & b.bits} : a;
  }
  const ulong sign = a.bits & kSignBit;
  uint exponent = exponent_of(a);
  const uint distance = exponent - exponent_of(b);
  const ulong larger = significand_of(a) << 3;
  ulong smaller = significand_of(b) << 3;
  if (distance > 55) {
    smaller = 1;
  } else if (distance > 0) {
    smaller = (smaller >> distance) | (smaller << (64 - distance) != 0 ? 1 : 0);
  }
  if (sign == (b.bits & kSignBit)) {
    ulong sum = larger + smaller;
    if (sum >> 56 != 0) {
      sum = (sum >> 1) | (sum & 1);
      ++exponent;
    }
    return rounded(sign, exponent, sum);
  }
  const ulong difference = larger - smaller;
  if (difference == 0) {
    return Float64{0};
  }
  const uint shift = uint(metal::clz(difference)) - 8;
  return rounded(sign, exponent - shift, difference << shift);
}

inline Float64 operator-(Float64 a, Float64 b) { return a + -b; }

inline Float64 operator*(Float64 a, Float64 b) {
  const ulong sign = (a.bits ^ b.bits) & kSignBit;
  if (is_zero(a) || is_zero(b)) {
    return Float64{sign};
  }
  // 64 times 64 bits, from the products of halves.
  const ulong x = significand_of(a) << 11;
  const ulong y = significand_of(b) << 11;
  const ulong x_low = x & 0xffffffff;
  const ulong x_high = x >> 32;
  const ulong y_low = y & 0xffffffff;
  const ulong y_high = y >> 32;
  const ulong lowest = x_low * y_low;
  const ulong middle = x_high * y_low + (lowest >> 32);
  const ulong other = x_low * y_high + (middle & 0xffffffff);
  ulong high = x_high * y_high + (middle >> 32) + (other >> 32);
  ulong low = (other << 32) | (lowest & 0xffffffff);
  uint exponent = exponent_of(a) + exponent_of(b) - kExponentBias + 1;
  if (high >> 63 == 0) {
    high = high << 1 | low >> 63;
    low <<= 1;
    --exponent;
  }
  const bool is_inexact = (high & 0xff) != 0 || low != 0;
  return rounded(sign, exponent, high >> 8 | (is_inexact ? 1 : 0));
}

/// `b` must not be zero.
inline Float64 operator/(Float64 a, Float64 b) {
  const ulong sign = (a.bits ^ b.bits) & kSignBit;
  if (is_zero(a)) {
    return Float64{sign};
  }
  ulong rest = significand_of(a);
  const ulong divisor = significand_of(b);
  uint exponent = exponent_of(a) + kExponentBias - exponent_of(b);
  if (rest < divisor) {
    rest <<= 1;
    --exponent;
  }
  ulong quotient = 0;
  for (uint bit = 0; bit < 56; ++bit) {
    const bool fits = rest >= divisor;
    quotient = quotient << 1 | (fits ? 1 : 0);
    rest = (fits ? rest - divisor : rest) << 1;
  }
  return rounded(sign, exponent, quotient | (rest != 0 ? 1 : 0));
}

inline bool operator<(Float64 a, Float64 b) {
  if (is_zero(a) && is_zero(b)) {
    return false;
  }
  const bool a_is_negative = a.bits >> 63 != 0;
  const bool b_is_negative = b.bits >> 63 != 0;
  if (a_is_negative != b_is_negative) {
    return a_is_negative;
  }
  return a_is_negative ? a.bits > b.bits : a.bits < b.bits;
}

/// `value`, which must be finite, exactly.
inline Float64 to_float64(float value) {
  const uint bits = as_type<uint>(value);
  const ulong sign = ulong(bits >> 31) << 63;
  uint magnitude = bits & 0x7fffffff;
  if (magnitude == 0) {
    return Float64{sign};
  }
  uint exponent = (magnitude >> 23) + kExponentBias - 127;
  uint significand = magnitude & 0x7fffff;
  if (magnitude < 0x800000) {
    const uint shift = metal::clz(magnitude) - 8;
    significand = (magnitude << shift) & 0x7fffff;
    exponent -= shift - 1;
  }
  return Float64{sign | ulong(exponent) << 52 | ulong(significand) << 29};
}

/// `value` must be less than 2^24 in magnitude.
inline Float64 to_float64(int value) { return to_float64(float(value)); }

/// The nearest float; one that is too large becomes infinite.
inline float to_float(Float64 value) {
  const uint sign = uint(value.bits >> 63) << 31;
  if (is_zero(value)) {
    return as_type<float>(sign);
  }
  const int exponent = int(exponent_of(value)) - int(kExponentBias) + 127;
  if (exponent > 254) {
    return as_type<float>(sign | 0x7f800000u);
  }
  // A subnormal has fewer bits, and no implicit one.
  const uint shift = exponent > 0 ? 29 : uint(metal::min(30 - exponent, 55));
  const ulong significand = significand_of(value);
  const ulong rest = significand << (64 - shift);
  uint kept = uint(significand >> shift);
  kept += rest > kSignBit || (rest == kSignBit && (kept & 1) != 0) ? 1 : 0;
  return as_type<float>(sign | ((exponent > 0 ? uint(exponent - 1) << 23 : 0) + kept));
}

/// The integer nearest to `value`, ties to even, as a float; 2^20 stands for all beyond it.
inline float round_even(Float64 value) {
  constexpr float kLimit = 0x1p20f;
  const Float64 limit = to_float64(kLimit);
  if (!(value < limit)) {
    return kLimit;
  }
  if (!(-limit < value)) {
    return -kLimit;
  }
  const Float64 magic = Float64{0x4338000000000000};  // 1.5 * 2^52
  return to_float((value + magic) - magic);
}

/// What `distance` lanes above this one have. Shuffled in halves, as integers of 64 bits can't be.
inline Float64 shuffle_down(Float64 value, ushort distance) {
  const uint low = metal::simd_shuffle_down(uint(value.bits), distance);
  const uint high = metal::simd_shuffle_down(uint(value.bits >> 32), distance);
  return Float64{ulong(high) << 32 | low};
}

inline Float64 broadcast(Float64 value, ushort lane) {
  const uint low = metal::simd_broadcast(uint(value.bits), lane);
  const uint high = metal::simd_broadcast(uint(value.bits >> 32), lane);
  return Float64{ulong(high) << 32 | low};
}

}  // namespace milpress
