#include "kernels/quantize.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "core/check.h"
#include "core/convert.h"
#include "core/order.h"
#include "core/parallel.h"
#include "core/prefetch.h"
#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr std::size_t kChunk = 2048;     // weights widened at a time; they stay in the L1 cache
constexpr std::size_t kGrain = 131'072;  // weights a thread takes at a time

struct Extremes {
  float low;
  float high;
};

struct Step {
  float scale;
  int offset;
  bool quotient_in_weight_precision;
};

MILPRESS_VECTORIZE
Extremes extremes_of(const float* values, std::size_t n) {
  std::int32_t low = std::numeric_limits<std::int32_t>::max();
  std::int32_t high = std::numeric_limits<std::int32_t>::min();
  for (std::size_t i = 0; i < n; ++i) {
    const std::int32_t key = order_key(values[i]);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  return {value_at(low), value_at(high)};
}

MILPRESS_VECTORIZE
Extremes extremes_of(const Half* values, std::size_t n) {
  std::int16_t low = std::numeric_limits<std::int16_t>::max();
  std::int16_t high = std::numeric_limits<std::int16_t>::min();
  for (std::size_t i = 0; i < n; ++i) {
    const std::int16_t key = order_key(values[i]);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  return {to_float(value_at(low)), to_float(value_at(high))};
}

// The nearest integer, ties to even; exact below 2^22, where every quotient of interest lies.
constexpr float round_even(float value) {
  constexpr float kMagic = 0x1.8p23F;
  return (value + kMagic) - kMagic;
}

// The precision of a half without its range: a quotient small enough to be subnormal rounds to
// zero all the same.
template <typename T>
constexpr float round_quotient(float value) {
  if constexpr (sizeof(T) == 2) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    return std::bit_cast<float>((bits + 0xfffU + (bits >> 13 & 1U)) & ~0x1fffU);
  } else {
    return value;
  }
}

// `weight / scale`, given the nearest float to `1 / scale`, which is quicker to multiply by. For
// halves, rounded to a half, the product is the quotient: a test compares all of them.
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

// What the step makes of `weight`, through the same arithmetic as the kernel and its inverse.
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
T next_above(T value) {
  return value_at(static_cast<decltype(order_key(value))>(order_key(value) + 1));
}

template <typename T>
T next_below(T value) {
  return value_at(static_cast<decltype(order_key(value))>(order_key(value) - 1));
}

int middle(CodeRange range) { return (range.code_min + range.code_max) / 2; }

int clamp_code(float code, CodeRange range) {
  return static_cast<int>(
      std::clamp(code, static_cast<float>(range.code_min), static_cast<float>(range.code_max)));
}

// The arithmetic of coremltools 9.0, each result rounded to the weight's own precision.
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
  for (const T scale : {nearest, next_below(nearest), next_above(nearest), wider, next_above(wider),
                        next_above(next_above(wider))}) {
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

// The range that a row is given: around zero, or holding it.
Extremes widened(Extremes extremes, bool fitted_offset) {
  if (fitted_offset) {
    return {std::min(0.0F, extremes.low), std::max(0.0F, extremes.high)};
  }
  const float limit = std::max(std::abs(extremes.low), std::abs(extremes.high));
  return {-limit, limit};
}

// ---------------------------------------------------------------------------------------------
// The search for the range of least squared error

constexpr std::size_t kLanes = 32;  // sums side by side, enough to hide how long an addition takes
constexpr std::size_t kMaxSteps = 32;

// A few steps, tried together while a chunk of the row is in the cache.
struct Steps {
  std::array<Step, kMaxSteps> items;
  std::size_t count = 0;
};

using Sums = std::array<double, kMaxSteps>;

// Weights of a row, multiplied by a power of two, with zeros up to a multiple of kLanes. Zero has a
// code of its own in every range, so those add no error.
using Chunk = std::array<float, kChunk>;

constexpr std::size_t whole_lanes(std::size_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The code without its offset. Multiplying by the inverse is off by a step only next to a tie.
constexpr float steps_from_zero(float weight, float inverse, float least, float greatest) {
  float quotient = weight * inverse;
  quotient = quotient > least ? quotient : least;
  quotient = quotient < greatest ? quotient : greatest;
  return round_even(quotient);
}

// Pairs are added, then pairs of pairs: as fast as it is fixed in its order.
template <typename Sum>
[[gnu::always_inline]] inline Sum sum_lanes(std::array<Sum, kLanes>& lanes) {
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

// Adds the squared error of each step, of weights and scales multiplied by `factor`. Steps, not
// weights, are taken side by side: a row may be short.
template <typename T, bool kWeighted>
MILPRESS_VECTORIZE void add_errors(const Chunk& chunk, const Chunk& importance, std::size_t n,
                                   const Steps& steps, CodeRange range, float factor,
                                   Sums& errors) {
  std::array<float, kMaxSteps> scales;
  std::array<float, kMaxSteps> inverses;
  std::array<float, kMaxSteps> least;
  std::array<float, kMaxSteps> greatest;
  std::array<float, kMaxSteps> sums{};
  for (std::size_t j = 0; j < kMaxSteps; ++j) {
    const Step& step = steps.items[j < steps.count ? j : 0];
    scales[j] = step.scale * factor;
    inverses[j] = 1.0F / scales[j];
    least[j] = static_cast<float>(range.code_min - step.offset);
    greatest[j] = static_cast<float>(range.code_max - step.offset);
  }
  const std::size_t n_lanes = steps.count <= kMaxSteps / 2 ? kMaxSteps / 2 : kMaxSteps;
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n_lanes; ++j) {
      const float code = steps_from_zero(chunk[i], inverses[j], least[j], greatest[j]);
      const float error = chunk[i] - round_quotient<T>(scales[j] * code);
      sums[j] += kWeighted ? importance[i] * (error * error) : error * error;
    }
  }
  std::transform(sums.begin(), sums.end(), errors.begin(), errors.begin(), std::plus<double>());
}

// Adds what least squares needs to fit a scale to the codes of `step`: the products of weights with
// codes less offset, and the squares of those.
template <bool kWeighted>
MILPRESS_VECTORIZE void add_moments(const Chunk& chunk, const Chunk& importance, std::size_t n,
                                    const Step& step, CodeRange range, float factor,
                                    Sums& moments) {
  const auto least = static_cast<float>(range.code_min - step.offset);
  const auto greatest = static_cast<float>(range.code_max - step.offset);
  const float inverse = 1.0F / (step.scale * factor);
  std::array<float, kLanes> products{};
  std::array<float, kLanes> squares{};
  for (std::size_t i = 0; i < n; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const float code = steps_from_zero(chunk[i + lane], inverse, least, greatest);
      const float share = kWeighted ? importance[i + lane] * code : code;
      products[lane] += chunk[i + lane] * share;
      squares[lane] += code * share;
    }
  }
  moments[0] += sum_lanes(products);
  moments[1] += sum_lanes(squares);
}

template <typename T, bool kRoundQuotient, bool kWeighted>
[[gnu::always_inline]] inline double restored_error(const Chunk& chunk, const Chunk& importance,
                                                    std::size_t n, const Step& step,
                                                    CodeRange range) {
  const auto offset = static_cast<float>(step.offset);
  const auto code_min = static_cast<float>(range.code_min);
  const auto code_max = static_cast<float>(range.code_max);
  const float inverse = 1.0F / step.scale;
  std::array<double, kLanes> sums{};
  for (std::size_t i = 0; i < n; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const float weight = chunk[i + lane];
      const float code =
          code_of<T, kRoundQuotient>(weight, step.scale, inverse, offset, code_min, code_max);
      // Rounds as decoding does: products of a half and an integer need no bits below the subnormal
      // halves', and those above the largest half were sorted out.
      const double error =
          static_cast<double>(weight) - round_quotient<T>(step.scale * (code - offset));
      sums[lane] += kWeighted ? importance[i + lane] * (error * error) : error * error;
    }
  }
  return sum_lanes(sums);
}

// Adds the squared error of each step in double, of codes as the kernel writes them.
template <typename T, bool kWeighted>
MILPRESS_VECTORIZE void add_restored_errors(const Chunk& chunk, const Chunk& importance,
                                            std::size_t n, const Steps& steps, CodeRange range,
                                            Sums& errors) {
  for (std::size_t j = 0; j < steps.count; ++j) {
    const Step& step = steps.items[j];
    errors[j] += step.quotient_in_weight_precision
                     ? restored_error<T, true, kWeighted>(chunk, importance, n, step, range)
                     : restored_error<T, false, kWeighted>(chunk, importance, n, step, range);
  }
}

MILPRESS_VECTORIZE
void multiply(float* values, std::size_t n, float factor) {
  for (std::size_t i = 0; i < n; ++i) {
    values[i] *= factor;
  }
}

// `kWeighted` says whether there is an importance.
template <typename T, bool kWeighted>
class RangeSearch {
 public:
  // `extremes` are those of the row, finite and not both zero.
  RangeSearch(std::span<const T> row, std::span<const float> importance, Extremes extremes,
              CodeRange range, bool fitted_offset)
      : row_(row),
        importance_(importance),
        extremes_(extremes),
        limit_(std::max(std::abs(extremes.low), std::abs(extremes.high))),
        range_(range),
        fitted_offset_(fitted_offset) {
    // So that squares of floats neither overflow nor vanish.
    constexpr int kMaxExponent = 126;
    factor_ = std::ldexp(1.0F, std::clamp(-std::ilogb(limit_), -kMaxExponent, kMaxExponent));
  }

  // The step of least error that was found, `plain` if none is better.
  Step best(const Step& plain) const {
    constexpr int kTurns = 2;
    Steps finalists;
    finalists.items[finalists.count++] = plain;
    Step step = fitted_offset_ ? best_of_ends(plain) : best_of_signs(plain);
    add_if_usable(finalists, step);
    for (int turn = 0; turn < kTurns && step.scale != 0; ++turn) {
      step.scale = least_squares(step);
      add_if_usable(finalists, step);
    }
    const Sums errors =
        sum_row(1.0F, [&](const Chunk& chunk, const Chunk& share, std::size_t n, Sums& sums) {
          add_restored_errors<T, kWeighted>(chunk, share, n, finalists, range_, sums);
        });
    return finalists.items[least_of(errors, finalists.count)];
  }

 private:
  static constexpr double kLeastShare = 0.4;  // of the row's range

  static std::size_t least_of(const Sums& errors, std::size_t count) {
    return static_cast<std::size_t>(std::min_element(errors.begin(), errors.begin() + count) -
                                    errors.begin());
  }

  // Adds up what `add(chunk, importance, n, sums)` adds for every chunk of the row times `factor`,
  // in pieces that depend on the row's length only.
  template <typename Add>
  Sums sum_row(float factor, const Add& add) const {
    const auto sum_piece = [&](std::size_t begin, std::size_t end) {
      Sums sums{};
      Chunk chunk;
      Chunk share;
      for (; begin < end; begin += std::min(kChunk, end - begin)) {
        const std::size_t n = std::min(kChunk, end - begin);
        widen(row_.data() + begin, n, chunk.data());
        if (factor != 1) {
          multiply(chunk.data(), n, factor);
        }
        std::fill(chunk.begin() + n, chunk.begin() + whole_lanes(n), 0.0F);
        if constexpr (kWeighted) {
          std::copy_n(importance_.begin() + begin, n, share.begin());
          std::fill(share.begin() + n, share.begin() + whole_lanes(n), 0.0F);
        }
        add(chunk, share, n, sums);
      }
      return sums;
    };
    if (row_.size() <= kGrain) {
      return sum_piece(0, row_.size());
    }
    std::vector<Sums> partial((row_.size() - 1) / kGrain + 1);
    parallel_for(row_.size(), kGrain, [&](std::size_t begin, std::size_t end) {
      partial[begin / kGrain] = sum_piece(begin, end);
    });
    Sums total{};
    for (const Sums& sums : partial) {
      std::transform(total.begin(), total.end(), sums.begin(), total.begin(), std::plus<>());
    }
    return total;
  }

  void add_if_usable(Steps& steps, const Step& step) const {
    if (step.scale == 0 || !std::isfinite(step.scale)) {
      return;
    }
    // A restored weight exceeds the weight by half a step at most, and no step is above `limit_`.
    constexpr float kMax = sizeof(T) == 2 ? 65504.0F : std::numeric_limits<float>::max();
    if (limit_ <= kMax / 2 || (std::isfinite(restored<T>(extremes_.low, step, range_)) &&
                               std::isfinite(restored<T>(extremes_.high, step, range_)))) {
      steps.items[steps.count++] = step;
    }
  }

  static Step step_of(double scale, int offset) {
    return {round_to<T>(static_cast<float>(scale)), offset, false};
  }

  std::size_t best_of(const Steps& steps) const {
    const Sums errors =
        sum_row(factor_, [&](const Chunk& chunk, const Chunk& share, std::size_t n, Sums& sums) {
          add_errors<T, kWeighted>(chunk, share, n, steps, range_, factor_, sums);
        });
    return least_of(errors, steps.count);
  }

  Step best_of_signs(const Step& plain) const {
    constexpr int kShares = kMaxSteps / 2;
    const int offset = middle(range_);
    const int down = offset - range_.code_min;
    const int up = range_.code_max - offset;
    const double reach = std::max(down, up);
    const double widest = limit_ / std::max(1, std::min(down, up));  // both extremes in the range
    const double shrinkage = (widest - kLeastShare * limit_ / reach) / (kShares - 1);
    Steps steps;
    for (const int sign : {1, -1}) {
      if (sign > 0 || (down != up && range_.code_min < 0)) {
        for (int i = 0; i < kShares; ++i) {
          add_if_usable(steps, step_of(sign * (widest - shrinkage * i), offset));
        }
      }
    }
    return steps.count == 0 ? plain : steps.items[best_of(steps)];
  }

  // `low` and `high` are shares of what the row extends to either side of zero.
  Step step_of_ends(double low, double high) const {
    low *= std::min(0.0F, extremes_.low);
    high *= std::max(0.0F, extremes_.high);
    Step step = step_of((high - low) / (range_.code_max - range_.code_min), 0);
    const double zero = std::nearbyint(range_.code_min - low / step.scale);
    step.offset = std::isfinite(zero) ? clamp_code(static_cast<float>(zero), range_) : 0;
    return step;
  }

  Step best_of_ends(const Step& plain) const {
    constexpr int kShares = 16;
    Steps joint;
    std::array<double, kMaxSteps> shares;
    for (int i = 0; i < kShares; ++i) {
      shares[joint.count] = 1 - (1 - kLeastShare) * i / (kShares - 1);
      add_if_usable(joint, step_of_ends(shares[joint.count], shares[joint.count]));
    }
    if (joint.count == 0) {
      return plain;
    }
    const std::size_t best = best_of(joint);
    const double share = shares[best];
    Steps apart;
    apart.items[apart.count++] = joint.items[best];
    for (const double ratio : {0.6, 0.7, 0.8, 0.9, 1.1, 1.2}) {
      const double other = std::min(1.0, ratio * share);
      add_if_usable(apart, step_of_ends(other, share));
      add_if_usable(apart, step_of_ends(share, other));
    }
    return apart.items[best_of(apart)];
  }

  // The scale of least error for the codes of `step`, 0 if they are all the code of zero.
  float least_squares(const Step& step) const {
    const Sums moments =
        sum_row(factor_, [&](const Chunk& chunk, const Chunk& share, std::size_t n, Sums& sums) {
          add_moments<kWeighted>(chunk, share, n, step, range_, factor_, sums);
        });
    return moments[1] > 0 ? step_of(moments[0] / moments[1] / factor_, 0).scale : 0.0F;
  }

  std::span<const T> row_;
  std::span<const float> importance_;
  Extremes extremes_;
  float limit_;
  CodeRange range_;
  bool fitted_offset_;
  float factor_;
};

// ---------------------------------------------------------------------------------------------
// Rows: fitted and encoded several at a time, so that short ones cost no more than long ones

// Steps of a few rows, field by field.
struct RowSteps {
  std::vector<float> scales;
  std::vector<float> offsets;
  std::vector<std::uint8_t> rounds_quotient;

  explicit RowSteps(std::size_t n) : scales(n), offsets(n), rounds_quotient(n) {}

  void set(std::size_t row, const Step& step) {
    scales[row] = step.scale;
    offsets[row] = static_cast<float>(step.offset);
    rounds_quotient[row] = step.quotient_in_weight_precision ? 1 : 0;
  }
};

template <typename T>
using Magnitude = decltype(magnitude_bits(T{}));

template <typename T>
constexpr float magnitude_of(Magnitude<T> bits) {
  if constexpr (sizeof(T) == 2) {
    return to_float(Half{bits});
  } else {
    return std::bit_cast<float>(bits);
  }
}

template <typename T>
MILPRESS_VECTORIZE void find_limits(const T* weights, std::size_t n_rows, std::size_t n_cols,
                                    float* limits) {
  for (std::size_t row = 0; row < n_rows; ++row) {
    Magnitude<T> greatest = 0;
    for (std::size_t i = 0; i < n_cols; ++i) {
      const Magnitude<T> bits = magnitude_bits(weights[row * n_cols + i]);
      greatest = bits > greatest ? bits : greatest;
    }
    limits[row] = magnitude_of<T>(greatest);
  }
}

// The scales of symmetric rows by their limits, all at once; false if one is not plain.
template <typename T>
MILPRESS_VECTORIZE bool find_plain_scales(const float* limits, std::size_t n, CodeRange range,
                                          float* scales) {
  constexpr float kSmallest = smallest_normal<T>();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto n_steps = static_cast<float>(range.code_max - range.code_min);
  std::uint32_t n_plain = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const float scale = round_to<T>(round_to<T>(limits[i] + limits[i]) / n_steps);
    scales[i] = scale;
    n_plain += static_cast<std::uint32_t>((scale >= kSmallest) & (scale < kInfinity));
  }
  return n_plain == n;
}

// Codes of plain symmetric rows, which need no limits: the greatest magnitude divided by its scale
// is off the outermost code by half a last place. Adding 1.5 * 2^23 leaves the code in the low
// byte.
template <typename T>
MILPRESS_VECTORIZE void encode_plain(const float* weights, std::size_t n_rows, std::size_t n_cols,
                                     const float* scales, std::int32_t* codes) {
  for (std::size_t row = 0; row < n_rows; ++row) {
    const float scale = scales[row];
    const float inverse = 1.0F / scale;
    const float* const in = weights + row * n_cols;
    std::int32_t* const out = codes + row * n_cols;
    for (std::size_t i = 0; i < n_cols; ++i) {
      const float quotient = quotient_of<T, true>(in[i], scale, inverse);
      out[i] = std::bit_cast<std::int32_t>(quotient + 0x1.8p23F);
    }
  }
}

template <typename T, bool kRoundQuotient>
MILPRESS_VECTORIZE void encode_row(const float* weights, std::size_t n, float scale, float offset,
                                   CodeRange range, std::int32_t* codes) {
  const auto code_min = static_cast<float>(range.code_min);
  const auto code_max = static_cast<float>(range.code_max);
  const float inverse = 1.0F / scale;
  for (std::size_t i = 0; i < n; ++i) {
    codes[i] = static_cast<std::int32_t>(
        code_of<T, kRoundQuotient>(weights[i], scale, inverse, offset, code_min, code_max));
  }
}

template <typename Code>
MILPRESS_VECTORIZE void narrow_codes(const std::int32_t* codes, std::size_t n, int offset,
                                     Code* out) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = static_cast<Code>(codes[i] + offset);
  }
}

template <typename T, typename Code>
struct Quantizer {
  MatrixView<const T> weights;
  MatrixView<const float> importance;  // empty where all weights count alike
  CodeRange range;
  bool searches;  // for the range of least squared error
  std::span<T> scales;
  std::span<Code> offsets;
  MatrixView<Code> codes;

  // Whether rows may be plain: with as many codes on either side of the middle, none needs a limit.
  bool is_symmetric() const {
    return offsets.empty() && !searches && (range.code_max - range.code_min) % 2 == 0;
  }

  Step fit(std::size_t row, Extremes extremes) const {
    const bool fitted = !offsets.empty();
    const bool finite = std::isfinite(extremes.low) && std::isfinite(extremes.high);
    Step step = step_for<T>(finite ? widened(extremes, fitted) : extremes, range, fitted);
    if (searches && finite && (extremes.low != 0 || extremes.high != 0)) {
      if (importance.size() > 0) {
        const std::span<const float> share = importance.row(row);
        step = RangeSearch<T, true>(weights.row(row), share, extremes, range, fitted).best(step);
      } else {
        step = RangeSearch<T, false>(weights.row(row), {}, extremes, range, fitted).best(step);
      }
    }
    return step;
  }

  // Fits `count` rows from `first` on and stores their scales and offsets; true if all are plain.
  bool fit_rows(std::size_t first, std::size_t count, RowSteps& steps) const {
    const std::size_t n_cols = weights.n_cols;
    const T* const begin = weights.row(first).data();
    bool all_plain = false;
    if (is_symmetric()) {
      find_limits(begin, count, n_cols, steps.offsets.data());
      const float* const limits = steps.offsets.data();
      all_plain = find_plain_scales<T>(limits, count, range, steps.scales.data());
      for (std::size_t i = 0; i < count && !all_plain; ++i) {
        steps.set(i, step_for<T>({-limits[i], limits[i]}, range, false));
      }
    } else {
      for (std::size_t i = 0; i < count; ++i) {
        const Step step = fit(first + i, extremes_of(begin + i * n_cols, n_cols));
        steps.set(i, step);
        if (!offsets.empty()) {
          offsets[first + i] = static_cast<Code>(step.offset);
        }
      }
    }
    narrow(steps.scales.data(), count, scales.data() + first);
    return all_plain;
  }

  // Encodes `n_rows` rows of `n_cols` weights, kChunk of them at most.
  void encode_rows(const T* in, std::size_t n_rows, std::size_t n_cols, const RowSteps& steps,
                   bool all_plain, Code* out) const {
    std::array<float, kChunk> values;
    std::array<std::int32_t, kChunk> wide_codes;
    const std::size_t n = n_rows * n_cols;
    widen(in, n, values.data());
    if (all_plain) {
      encode_plain<T>(values.data(), n_rows, n_cols, steps.scales.data(), wide_codes.data());
      narrow_codes(wide_codes.data(), n, middle(range), out);
      return;
    }
    for (std::size_t row = 0; row < n_rows; ++row) {
      const auto encode =
          steps.rounds_quotient[row] != 0 ? encode_row<T, true> : encode_row<T, false>;
      encode(values.data() + row * n_cols, n_cols, steps.scales[row], steps.offsets[row], range,
             wide_codes.data() + row * n_cols);
    }
    narrow_codes(wide_codes.data(), n, 0, out);
  }

  // Encodes a part of a row while what lies `ahead` is fetched.
  void encode_piece(std::size_t first, std::size_t n, const RowSteps& steps, bool is_plain,
                    std::size_t ahead) const {
    const std::span<const T> all = weights.flat();
    for (std::size_t begin = first; begin < first + n; begin += kChunk) {
      const std::size_t count = std::min(kChunk, first + n - begin);
      prefetch(all, begin + ahead, kChunk);
      encode_rows(all.data() + begin, 1, count, steps, is_plain, codes.data + begin);
    }
  }

  void short_rows(std::size_t begin, std::size_t end) const {
    const std::size_t n_cols = weights.n_cols;
    const std::size_t at_once = kChunk / n_cols;
    RowSteps steps(at_once);
    for (std::size_t first = begin; first < end; first += at_once) {
      const std::size_t count = std::min(at_once, end - first);
      prefetch(weights.flat(), (first + count) * n_cols, at_once * n_cols);
      const bool all_plain = fit_rows(first, count, steps);
      encode_rows(weights.row(first).data(), count, n_cols, steps, all_plain,
                  codes.row(first).data());
    }
  }

  void long_rows(std::size_t begin, std::size_t end) const {
    RowSteps steps(1);
    for (std::size_t i = begin; i < end; ++i) {
      const bool is_plain = fit_rows(i, 1, steps);
      encode_piece(i * weights.n_cols, weights.n_cols, steps, is_plain, weights.n_cols);
    }
  }

  // A row long enough to occupy every thread by itself.
  void giant_row(std::size_t i) const {
    const std::span<const T> row = weights.row(i);
    std::vector<Extremes> partial((row.size() - 1) / kGrain + 1);
    parallel_for(row.size(), kGrain, [&](std::size_t begin, std::size_t end) {
      partial[begin / kGrain] = extremes_of(row.data() + begin, end - begin);
    });
    std::vector<float> all;
    for (const Extremes& extremes : partial) {
      all.insert(all.end(), {extremes.low, extremes.high});
    }
    const Step step = fit(i, extremes_of(all.data(), all.size()));
    RowSteps steps(1);
    steps.set(0, step);
    scales[i] = from_float<T>(step.scale);
    if (!offsets.empty()) {
      offsets[i] = static_cast<Code>(step.offset);
    }
    const bool is_plain = is_symmetric() && step.quotient_in_weight_precision;
    parallel_for(row.size(), kGrain, [&](std::size_t begin, std::size_t end) {
      encode_piece(i * row.size() + begin, end - begin, steps, is_plain, kChunk);
    });
  }
};

template <typename T, typename Code>
void quantize_rows(const Quantizer<T, Code>& quantizer) {
  const MatrixView<const T> weights = quantizer.weights;
  const CodeRange range = quantizer.range;
  const std::span<T> scales = quantizer.scales;
  const std::span<Code> offsets = quantizer.offsets;
  const MatrixView<Code> codes = quantizer.codes;
  check(range.code_min < range.code_max && range.code_min >= std::numeric_limits<Code>::min() &&
            range.code_max <= std::numeric_limits<Code>::max(),
        "code range must ascend within a byte, got ", range.code_min, " to ", range.code_max);
  check(scales.size() == weights.n_rows, "scales must have one element a row, ", weights.n_rows,
        ", got ", scales.size());
  check(offsets.empty() || offsets.size() == weights.n_rows,
        "offsets must be empty or have one element a row, ", weights.n_rows, ", got ",
        offsets.size());
  check(codes.n_rows == weights.n_rows && codes.n_cols == weights.n_cols,
        "codes must have the shape of weights");
  if (weights.n_cols == 0) {
    std::fill(scales.begin(), scales.end(), from_float<T>(1.0F));
    std::fill(offsets.begin(), offsets.end(), static_cast<Code>(clamp_code(0, range)));
    return;
  }
  if (weights.n_cols > 4 * kGrain) {
    for (std::size_t i = 0; i < weights.n_rows; ++i) {
      quantizer.giant_row(i);
    }
    return;
  }
  const std::size_t grain = std::max<std::size_t>(1, kGrain / weights.n_cols);
  parallel_for(weights.n_rows, grain, [&](std::size_t begin, std::size_t end) {
    if (weights.n_cols <= kChunk) {
      quantizer.short_rows(begin, end);
    } else {
      quantizer.long_rows(begin, end);
    }
  });
}

}  // namespace

template <typename T, typename Code>
void quantize(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
              std::span<Code> offsets, MatrixView<Code> codes) {
  quantize_rows(Quantizer<T, Code>{weights, {}, range, false, scales, offsets, codes});
}

template <typename T, typename Code>
void quantize_mse(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
                  std::span<Code> offsets, MatrixView<Code> codes) {
  quantize_rows(Quantizer<T, Code>{weights, {}, range, true, scales, offsets, codes});
}

template <typename T, typename Code>
void quantize_mse_weighted(MatrixView<const T> weights, MatrixView<const float> importance,
                           CodeRange range, std::span<T> scales, std::span<Code> offsets,
                           MatrixView<Code> codes) {
  check(importance.n_rows == weights.n_rows && importance.n_cols == weights.n_cols,
        "importance must have the shape of weights");
  quantize_rows(Quantizer<T, Code>{weights, importance, range, true, scales, offsets, codes});
}

namespace {

template <typename Code>
MILPRESS_VECTORIZE void decode_row(const Code* codes, std::size_t n, float scale, float offset,
                                   float* out) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = scale * (static_cast<float>(codes[i]) - offset);
  }
}

}  // namespace

template <typename T, typename Code>
void dequantize(MatrixView<const Code> codes, std::span<const T> scales,
                std::span<const Code> offsets, MatrixView<T> weights) {
  check(scales.size() == codes.n_rows, "scales must have one element a row, ", codes.n_rows,
        ", got ", scales.size());
  check(offsets.empty() || offsets.size() == codes.n_rows,
        "offsets must be empty or have one element a row, ", codes.n_rows, ", got ",
        offsets.size());
  check(weights.n_rows == codes.n_rows && weights.n_cols == codes.n_cols,
        "weights must have the shape of codes");
  const std::size_t n_cols = codes.n_cols;
  parallel_for(codes.size(), kGrain, [&](std::size_t begin, std::size_t end) {
    std::array<float, kChunk> values;
    while (begin < end) {
      const std::size_t row = begin / n_cols;
      const std::size_t count = std::min({kChunk, end - begin, (row + 1) * n_cols - begin});
      const float offset = offsets.empty() ? 0.0F : static_cast<float>(offsets[row]);
      decode_row(codes.data + begin, count, to_float(scales[row]), offset, values.data());
      narrow(values.data(), count, weights.data + begin);
      begin += count;
    }
  });
}

#define MILPRESS_INSTANTIATE(T, Code)                                                          \
  template void quantize(MatrixView<const T>, CodeRange, std::span<T>, std::span<Code>,        \
                         MatrixView<Code>);                                                    \
  template void quantize_mse(MatrixView<const T>, CodeRange, std::span<T>, std::span<Code>,    \
                             MatrixView<Code>);                                                \
  template void quantize_mse_weighted(MatrixView<const T>, MatrixView<const float>, CodeRange, \
                                      std::span<T>, std::span<Code>, MatrixView<Code>);        \
  template void dequantize(MatrixView<const Code>, std::span<const T>, std::span<const Code>,  \
                           MatrixView<T>);

MILPRESS_INSTANTIATE(Half, std::int8_t)
MILPRESS_INSTANTIATE(Half, std::uint8_t)
MILPRESS_INSTANTIATE(float, std::int8_t)
MILPRESS_INSTANTIATE(float, std::uint8_t)

}  // namespace milpress
