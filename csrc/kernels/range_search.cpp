#include "kernels/range_search.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include "core/convert.h"
#include "core/lanes.h"
#include "core/parallel.h"
#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr std::size_t kChunk = 2048;     // weights widened at a time; they stay in the L1 cache
constexpr std::size_t kGrain = 131'072;  // weights a thread takes at a time
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

MILPRESS_VECTORIZE void multiply(float* values, std::size_t n, float factor) {
  for (std::size_t i = 0; i < n; ++i) {
    values[i] *= factor;
  }
}

// `kWeighted` says whether there is an importance.
template <typename T, bool kWeighted>
class RangeSearch {
 public:
  RangeSearch(std::span<const T> row, std::span<const float> importance, Extremes extremes,
              CodeRange range, bool fitted_offset)
      : row_(row),
        importance_(importance),
        extremes_(extremes),
        limit_(std::max(std::abs(extremes.low), std::abs(extremes.high))),
        range_(range),
        fitted_offset_(fitted_offset),
        factor_(factor_to_one(limit_)) {}

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
    Sums total{};
    for (const Sums& sums : parallel_map(row_.size(), kGrain, sum_piece)) {
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
  float factor_;  // so that squares of floats neither overflow nor vanish
};

}  // namespace

template <typename T>
Step search_range(std::span<const T> row, std::span<const float> importance, Extremes extremes,
                  CodeRange range, bool fitted_offset, const Step& plain) {
  return importance.empty()
             ? RangeSearch<T, false>(row, {}, extremes, range, fitted_offset).best(plain)
             : RangeSearch<T, true>(row, importance, extremes, range, fitted_offset).best(plain);
}

template Step search_range(std::span<const Half>, std::span<const float>, Extremes, CodeRange, bool,
                           const Step&);
template Step search_range(std::span<const float>, std::span<const float>, Extremes, CodeRange,
                           bool, const Step&);

}  // namespace milpress
