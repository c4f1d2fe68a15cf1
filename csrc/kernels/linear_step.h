#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/half.h"
#include "core/keys.h"

namespace milpress {

/// The codes that a block may use, `code_min` to `code_max`, within the range of a byte.
struct CodeRange {
  int code_min = -127;
  int code_max = 127;
};

constexpr float magnitude(float value) { return magnitude_at<float>(magnitude_bits(value)); }

/// The largest error that `quantize` promises for `weight` restored as `decoded`: half a step,
/// half a last place of the quotient and of the product, and the spacing of subnormals.
template <typename T>
constexpr float half_step_bound(float weight, float decoded, float scale) {
  constexpr float kHalfPlace = sizeof(T) == 2 ? 0x1.01p-11F : 0x1.01p-24F;
  constexpr float kSubnormal = sizeof(T) == 2 ? 0x1p-25F : 0x1p-149F;
  // Multiplied apart: the sum of two large magnitudes may overflow.
  const float places = kHalfPlace * magnitude(weight) + kHalfPlace * magnitude(decoded);
  return 0.5F * scale + places + kSubnormal;
}

struct Extremes {
  float low;
  float high;
};

struct Step {
  float scale;
  int offset;
  bool quotient_in_weight_precision;
};

/// The nearest integer, ties to even; exact below 2^22, where every quotient of interest lies.
constexpr float round_even(float value) {
  constexpr float kMagic = 0x1.8p23F;
  return (value + kMagic) - kMagic;
}

/// The precision of a half without its range: a quotient small enough to be subnormal rounds to
/// zero all the same.
template <typename T>
constexpr float round_quotient(float value) {
  if constexpr (sizeof(T) == 2) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    return std::bit_cast<float>((bits + 0xfffU + (bits >> 13 & 1U)) & ~0x1fffU);
  } else {
    return value;
  }
}

/// `weight / scale`, given the nearest float to `1 / scale`, which is quicker to multiply by. For
/// halves, rounded to a half, the product is the quotient: a test compares all of them.
template <typename T, bool kRounded>
constexpr float quotient_of(float weight, float scale, float inverse) {
  if constexpr (sizeof(T) == 2 && kRounded) {
    return round_quotient<T>(weight * inverse);
  } else {
    return kRounded ? round_quotient<T>(weight / scale) : weight / scale;
  }
}

template <typename T, bool kRoundQuotient>
constexpr float code_of(float weight, float scale, float inverse, float offset, float code_min,
                        float code_max) {
  // Limits far beyond any code, so that the rounding trick holds for a fallback scale too.
  float quotient = quotient_of<T, kRoundQuotient>(weight, scale, inverse);
  quotient = quotient > -1024 ? quotient : -1024;
  quotient = quotient < 1024 ? quotient : 1024;
  float code = round_even(quotient) + offset;
  code = code > code_min ? code : code_min;
  code = code < code_max ? code : code_max;
  return code;
}

/// What the step makes of `weight`, through the same arithmetic as the kernel and its inverse.
template <typename T>
float restored(float weight, const Step& step, CodeRange range) {
  const auto offset = static_cast<float>(step.offset);
  const auto low = static_cast<float>(range.code_min);
  const auto high = static_cast<float>(range.code_max);
  const float code = step.quotient_in_weight_precision
                         ? code_of<T, true>(weight, step.scale, 1 / step.scale, offset, low, high)
                         : code_of<T, false>(weight, step.scale, 0, offset, low, high);
  return round_to<T>(step.scale * (code - offset));
}

template <typename T>
bool is_sound(const Step& step, Extremes extremes, CodeRange range) {
  if (!(step.scale > 0) || !std::isfinite(step.scale)) {
    return false;
  }
  for (const float weight : {extremes.low, extremes.high}) {
    const float decoded = restored<T>(weight, step, range);
    // The bound of an infinite value is infinite: it has to be refused by itself.
    if (!std::isfinite(decoded) ||
        !(std::abs(weight - decoded) <= half_step_bound<T>(weight, decoded, step.scale))) {
      return false;
    }
  }
  return true;
}

template <typename T>
T next_above(T value, int n_steps = 1) {
  return value_at(static_cast<Key<T>>(order_key(value) + n_steps));
}

constexpr int middle(CodeRange range) { return (range.code_min + range.code_max) / 2; }

constexpr int clamp_code(float code, CodeRange range) {
  return static_cast<int>(
      std::clamp(code, static_cast<float>(range.code_min), static_cast<float>(range.code_max)));
}

/// The arithmetic of coremltools 9.0, each result rounded to the weight's own precision.
template <typename T>
Step compatible_step(Extremes extremes, CodeRange range, bool fitted_offset) {
  const auto n_steps = static_cast<float>(range.code_max - range.code_min);
  const float width = round_to<T>(extremes.high - extremes.low);
  Step step{round_to<T>(width / n_steps), middle(range), true};
  if (fitted_offset) {
    const float numerator =
        round_to<T>(round_to<T>(static_cast<float>(range.code_min) * extremes.high) -
                    round_to<T>(static_cast<float>(range.code_max) * extremes.low));
    const float offset = std::nearbyint(round_to<T>(numerator / width));
    step.offset = std::isfinite(offset) ? clamp_code(offset, range) : 0;
  }
  return step;
}

template <typename T>
constexpr float smallest_normal() {
  return sizeof(T) == 2 ? 0x1p-14F : 0x1p-126F;
}

template <typename T>
constexpr bool is_plain_scale(float scale) {
  return scale >= smallest_normal<T>() && scale < std::numeric_limits<float>::infinity();
}

template <typename T>
Step step_for(Extremes extremes, CodeRange range, bool fitted_offset) {
  if (!std::isfinite(extremes.low) || !std::isfinite(extremes.high)) {
    return {std::numeric_limits<float>::quiet_NaN(), middle(range), true};
  }
  if (extremes.low == extremes.high) {
    return {1.0F, fitted_offset ? clamp_code(0, range) : middle(range), true};
  }
  // A symmetric scale of full precision always suits: the greatest code is off by at most half a
  // last place. (The range was finite in `T`, so no product overflows either.)
  const Step step = compatible_step<T>(extremes, range, fitted_offset);
  if ((!fitted_offset && is_plain_scale<T>(step.scale)) || is_sound<T>(step, extremes, range)) {
    return step;
  }
  const double width = static_cast<double>(extremes.high) - extremes.low;
  const T nearest = from_float<T>(static_cast<float>(width / (range.code_max - range.code_min)));
  // Where the outermost code would decode beyond the largest `T`: the scale by which the greater
  // extreme rounds to the code before it, half a step away. The lesser then can't overflow either.
  const float magnitude = std::max(std::abs(extremes.low), std::abs(extremes.high));
  const float n_outermost = std::max(1.0F, std::nearbyint(magnitude / to_float(nearest)));
  const T wider = from_float<T>(magnitude / (n_outermost - 0.5F));
  Step last{};
  for (const T scale : {nearest, next_above(nearest, -1), next_above(nearest), wider,
                        next_above(wider), next_above(wider, 2)}) {
    const float value = to_float(scale);
    const float zero = std::nearbyint(static_cast<float>(range.code_min) - extremes.low / value);
    last = {value, fitted_offset && std::isfinite(zero) ? clamp_code(zero, range) : middle(range),
            false};
    if (is_sound<T>(last, extremes, range)) {
      break;
    }
  }
  return last;
}

/// The range that a row is given: around zero, or holding it.
inline Extremes widened(Extremes extremes, bool fitted_offset) {
  if (fitted_offset) {
    return {std::min(0.0F, extremes.low), std::max(0.0F, extremes.high)};
  }
  const float limit = std::max(std::abs(extremes.low), std::abs(extremes.high));
  return {-limit, limit};
}

}  // namespace milpress
