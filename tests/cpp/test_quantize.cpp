#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "core/half.h"
#include "core/keys.h"
#include "core/parallel.h"
#include "kernels/fidelity.h"
#include "kernels/quantize.h"

namespace milpress {
namespace {

template <typename T, typename Code>
struct Result {
  std::vector<T> scales;
  std::vector<Code> offsets;
  std::vector<Code> codes;
  std::vector<T> decoded;
};

enum class Range { kWhole, kSearched };

template <typename T, typename Code>
Result<T, Code> run(const std::vector<T>& weights, std::size_t n_rows, CodeRange range, bool fit,
                    Range of_row = Range::kWhole) {
  const std::size_t n_cols = weights.size() / n_rows;
  Result<T, Code> result{std::vector<T>(n_rows), std::vector<Code>(fit ? n_rows : 0),
                         std::vector<Code>(weights.size()), std::vector<T>(weights.size())};
  const MatrixView<const T> in{weights.data(), n_rows, n_cols};
  const MatrixView<Code> out{result.codes.data(), n_rows, n_cols};
  if (of_row == Range::kWhole) {
    quantize<T, Code>(in, range, result.scales, result.offsets, out);
  } else {
    quantize_mse<T, Code>(in, {}, range, result.scales, result.offsets, out);
  }
  std::vector<Code> offsets = result.offsets;
  if (!fit && range.code_min == 0) {
    offsets.assign(n_rows, static_cast<Code>(range.code_max / 2));
  }
  dequantize<T, Code>({result.codes.data(), n_rows, n_cols}, result.scales, offsets,
                      {result.decoded.data(), n_rows, n_cols});
  return result;
}

// Half a step, half a last place (and what the kernel's own floats add) of both, and of subnormals.
template <typename T>
double bound_of(double weight, double decoded, double scale) {
  const bool is_half = sizeof(T) == 2;
  return scale / 2 + (is_half ? 0x1.01p-11 : 0x1.01p-24) * (std::abs(weight) + std::abs(decoded)) +
         (is_half ? 0x1p-25 : 0x1p-149);
}

template <typename T, typename Code>
void check_half_step(float magnitude, std::size_t n_rows, std::size_t n_cols, CodeRange range,
                     bool fit) {
  std::mt19937 random(static_cast<unsigned>(n_cols));
  std::normal_distribution<float> normal(fit ? 0.5F : 0.0F, 1.0F);
  std::vector<T> weights(n_rows * n_cols);
  for (T& weight : weights) {
    weight = from_float<T>(std::clamp(normal(random) / 4, -1.0F, 1.0F) * magnitude);
  }
  const auto result = run<T, Code>(weights, n_rows, range, fit);
  std::size_t n_broken = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const double weight = to_float(weights[i]);
    const double decoded = to_float(result.decoded[i]);
    const double scale = to_float(result.scales[i / n_cols]);
    const int code = result.codes[i];
    const bool holds = std::isfinite(decoded) &&
                       std::abs(weight - decoded) <= bound_of<T>(weight, decoded, scale) &&
                       code >= range.code_min && code <= range.code_max;
    n_broken += holds ? 0U : 1U;
  }
  CHECK(n_broken == 0);
}

TEST_CASE("every weight is restored within half a step, at any magnitude and row length") {
  for (const float magnitude : {65504.0F, 40000.0F, 600.0F, 1.0F, 7e-3F, 1e-5F, 3e-7F, 6e-8F}) {
    for (const std::size_t n_cols : {1U, 31U, 32U, 33U, 2047U, 2048U, 2049U}) {
      for (const bool fit : {false, true}) {
        check_half_step<Half, std::int8_t>(magnitude, 3, n_cols,
                                           fit ? CodeRange{-128, 127} : CodeRange{-127, 127}, fit);
        check_half_step<Half, std::uint8_t>(magnitude, 3, n_cols,
                                            fit ? CodeRange{0, 255} : CodeRange{0, 254}, fit);
        check_half_step<Half, std::int8_t>(magnitude, 3, n_cols,
                                           fit ? CodeRange{-8, 7} : CodeRange{-7, 7}, fit);
        check_half_step<float, std::int8_t>(magnitude, 3, n_cols, CodeRange{-127, 127}, fit);
        check_half_step<float, std::uint8_t>(magnitude, 3, n_cols, CodeRange{0, 15}, fit);
      }
    }
  }
}

// The code of a weight in the weights' own precision, with a division.
int divided_code(Half weight, Half scale, CodeRange range) {
  const float quotient = round_to<Half>(to_float(weight) / to_float(scale));
  return std::clamp(static_cast<int>(std::nearbyint(quotient)), range.code_min, range.code_max);
}

TEST_CASE("the code of every half is what a division gives, for scales of every mantissa") {
  constexpr CodeRange kRange{-127, 127};
  for (unsigned mantissa = 0; mantissa < 1024; ++mantissa) {
    // A row whose greatest magnitude makes the scale, and every half up to it from a 512th on.
    const Half greatest{static_cast<std::uint16_t>(0x3c00U + mantissa)};
    std::vector<Half> row;
    for (auto bits = static_cast<std::uint16_t>(greatest.bits - (9U << 10U)); bits <= greatest.bits;
         ++bits) {
      row.push_back(Half{bits});
    }
    const auto result = run<Half, std::int8_t>(row, 1, kRange, false);
    std::size_t n_different = 0;
    for (std::size_t i = 0; i < row.size(); ++i) {
      n_different += result.codes[i] == divided_code(row[i], result.scales[0], kRange) ? 0U : 1U;
    }
    CHECK(n_different == 0);
  }
}

template <typename T, typename Code>
std::size_t count_broken(float greatest, CodeRange range, bool fit) {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> unit(0.0F, 1.0F);
  const std::size_t n_rows = 4000;
  std::vector<T> weights;
  for (std::size_t row = 0; row < n_rows; ++row) {
    const float high = row % 3 == 0 ? greatest : greatest * (1 - unit(random) / 50);
    const float low = row % 2 == 0 ? -high : -greatest * unit(random);
    for (const float weight : {high, low, high * unit(random), low * unit(random)}) {
      weights.push_back(from_float<T>(row % 5 == 4 ? -weight : weight));
    }
  }
  const auto result = run<T, Code>(weights, n_rows, range, fit);
  std::size_t n_broken = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const double weight = to_float(weights[i]);
    const double decoded = to_float(result.decoded[i]);
    const double bound = bound_of<T>(weight, decoded, to_float(result.scales[i / 4]));
    n_broken += std::isfinite(decoded) && std::abs(weight - decoded) <= bound ? 0U : 1U;
  }
  return n_broken;
}

TEST_CASE("weights next to the largest number are restored within half a step, never as infinity") {
  constexpr float kMax = std::numeric_limits<float>::max();
  for (const bool fit : {false, true}) {
    CAPTURE(fit);
    for (const CodeRange range : {CodeRange{-127, 127}, CodeRange{-128, 127}, CodeRange{-7, 7},
                                  CodeRange{-8, 7}, CodeRange{-2, 1}, CodeRange{-1, 1}}) {
      CAPTURE(range.code_min);
      CHECK(count_broken<Half, std::int8_t>(65504, range, fit) == 0);
      CHECK(count_broken<float, std::int8_t>(kMax, range, fit) == 0);
    }
    for (const int code_max : {255, 254, 15, 14}) {
      CAPTURE(code_max);
      CHECK(count_broken<Half, std::uint8_t>(65504, {0, code_max}, fit) == 0);
      CHECK(count_broken<float, std::uint8_t>(kMax, {0, code_max}, fit) == 0);
    }
  }
}

TEST_CASE("a code that decodes to infinity is outside every bound") {
  const std::vector<Half> weights(3, to_half(65504.0F));
  const std::vector<Half> scales{to_half(516.0F)};
  const std::vector<std::int8_t> codes{126, 127, -127};
  CHECK(
      compare_quantized<Half, std::int8_t>({weights.data(), 1, 3}, {codes.data(), 1, 3}, scales, {})
          .n_outside == 3);
}

// coremltools' arithmetic, each operation rounded to `T` like NumPy's. `sound` tells whether it
// restores the whole row within the bound; only then is there anything to agree with.
template <typename T>
struct Naive {
  float scale;
  float offset;
  std::vector<float> codes;
  bool sound;
};

template <typename T>
Naive<T> naive_codes(std::span<const T> row, CodeRange range, bool fit) {
  float low = 0;
  float high = 0;
  for (const T weight : row) {
    low = std::min(low, to_float(weight));
    high = std::max(high, to_float(weight));
  }
  const auto code_min = static_cast<float>(range.code_min);
  const auto code_max = static_cast<float>(range.code_max);
  const auto round = [](float value) { return round_to<T>(value); };
  float offset = std::trunc((code_min + code_max) / 2);
  if (!fit) {
    high = std::max(high, -low);
    low = -high;
  }
  const float width = round(high - low);
  const float scale = round(width / (code_max - code_min));
  if (fit) {
    const float numerator = round(round(code_min * high) - round(code_max * low));
    offset = std::clamp(std::nearbyint(round(numerator / width)), code_min, code_max);
  }
  Naive<T> result{scale, offset, {}, std::isfinite(scale) && scale > 0 && !std::isnan(offset)};
  for (const T weight : row) {
    const float code = std::nearbyint(round(to_float(weight) / scale)) + offset;
    result.codes.push_back(std::clamp(code, code_min, code_max));
    const float decoded = round(scale * (result.codes.back() - offset));
    result.sound = result.sound && std::isfinite(decoded) &&
                   std::abs(to_float(weight) - decoded) <=
                       half_step_bound<T>(to_float(weight), decoded, scale);
  }
  return result;
}

template <typename T, typename Code>
void check_naive(CodeRange range, bool fit) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::size_t n_sound = 0;
  std::size_t n_different = 0;
  for (int round = 0; round < 400; ++round) {
    const std::size_t n = 1 + random() % 70;
    const float magnitude = std::ldexp(1.0F, static_cast<int>(random() % 30) - 18);
    const float shift = static_cast<float>(random() % 3) - 1;
    std::vector<T> weights(n);
    for (T& weight : weights) {
      weight = from_float<T>(std::clamp((normal(random) + shift) * magnitude, -65504.F, 65504.F));
    }
    const Naive<T> expected = naive_codes<T>(weights, range, fit);
    if (expected.sound) {
      const auto result = run<T, Code>(weights, 1, range, fit);
      ++n_sound;
      n_different += to_float(result.scales[0]) != expected.scale ? 1U : 0U;
      n_different += fit && static_cast<float>(result.offsets[0]) != expected.offset ? 1U : 0U;
      n_different += std::equal(result.codes.begin(), result.codes.end(), expected.codes.begin(),
                                [](Code a, float b) { return static_cast<float>(a) == b; })
                         ? 0U
                         : 1U;
    }
  }
  CHECK(n_different == 0);
  CHECK(n_sound > 100);  // or the law would say little
}

TEST_CASE("scales, offsets and codes are those of coremltools wherever its own are sound") {
  for (const bool fit : {false, true}) {
    CAPTURE(fit);
    check_naive<Half, std::int8_t>(fit ? CodeRange{-128, 127} : CodeRange{-127, 127}, fit);
    check_naive<Half, std::int8_t>(fit ? CodeRange{-8, 7} : CodeRange{-7, 7}, fit);
    check_naive<Half, std::uint8_t>(fit ? CodeRange{0, 255} : CodeRange{0, 254}, fit);
    check_naive<float, std::int8_t>({-127, 127}, fit);
    check_naive<float, std::uint8_t>(fit ? CodeRange{0, 15} : CodeRange{0, 14}, fit);
  }
}

// Where coremltools' arithmetic is not sound: the first of a few scales that restores both ends of
// the range. First the one nearest to an equal share of the range, and its neighbours.
template <typename T>
struct Fallback {
  std::size_t place;  // among the scales tried
  float scale;
  float offset;
};

template <typename T>
float beside(T scale, int distance) {
  return to_float(value_at(static_cast<decltype(order_key(scale))>(order_key(scale) + distance)));
}

template <typename T>
bool restores(float weight, float scale, float offset, CodeRange range) {
  const float code =
      std::clamp(std::nearbyint(weight / scale) + offset, static_cast<float>(range.code_min),
                 static_cast<float>(range.code_max));
  const float decoded = round_to<T>(scale * (code - offset));
  return std::isfinite(decoded) &&
         std::abs(weight - decoded) <= half_step_bound<T>(weight, decoded, scale);
}

template <typename T>
Fallback<T> fallback(float low, float high, CodeRange range, bool fit) {
  const double share = (double{high} - low) / (range.code_max - range.code_min);
  const T nearest = from_float<T>(static_cast<float>(share));
  // With one step less, the greater end lies half a step beyond the outermost code.
  const float greatest = std::max(high, -low);
  const float n_steps = std::max(1.0F, std::nearbyint(greatest / to_float(nearest)));
  const T wider = from_float<T>(greatest / (n_steps - 0.5F));
  const std::vector<float> scales{to_float(nearest), beside(nearest, -1), beside(nearest, 1),
                                  to_float(wider),   beside(wider, 1),    beside(wider, 2)};
  for (std::size_t place = 0; place < scales.size(); ++place) {
    const float scale = scales[place];
    const auto code_min = static_cast<float>(range.code_min);
    const auto code_max = static_cast<float>(range.code_max);
    const float offset =
        fit ? std::clamp(std::nearbyint(code_min - low / scale), code_min, code_max)
            : std::trunc((code_min + code_max) / 2);
    if (scale > 0 && std::isfinite(scale) && restores<T>(low, scale, offset, range) &&
        restores<T>(high, scale, offset, range)) {
      return {place, scale, offset};
    }
  }
  return {scales.size(), 0, 0};
}

TEST_CASE_TEMPLATE("where coremltools' scale is not sound, the first sound one nearby is taken", T,
                   Half, float) {
  constexpr float kMax = sizeof(T) == 2 ? 65504.0F : std::numeric_limits<float>::max();
  constexpr float kMin = sizeof(T) == 2 ? 0x1p-24F : 0x1p-149F;
  std::mt19937 random(11);
  std::uniform_real_distribution<float> unit(0.0F, 1.0F);
  std::array<std::size_t, 7> n_at{};  // rows by the place of their scale
  std::size_t n_different = 0;
  for (int round = 0; round < 100'000; ++round) {
    const bool fit = random() % 2 == 0;
    const int code_max = 1 + static_cast<int>(random() % 127);
    const CodeRange range{-code_max - static_cast<int>(random() % 2), code_max};
    // Next to the largest number, or a few of the smallest.
    float high = round % 2 == 0 ? kMax * (1 - unit(random) / 50 * static_cast<float>(random() % 2))
                                : kMin * static_cast<float>(1 + random() % 3000);
    float low = fit ? -high * unit(random) : -high;
    if (random() % 2 == 0) {
      std::swap(low, high);
      low = -low;
      high = -high;
    }
    const std::vector<T> row{from_float<T>(low), from_float<T>(high)};
    low = to_float(row[0]);
    high = to_float(row[1]);
    if (low == high || naive_codes<T>(row, range, fit).sound) {
      continue;
    }
    const Fallback<T> expected = fallback<T>(low, high, range, fit);
    const auto result = run<T, std::int8_t>(row, 1, range, fit);
    ++n_at[expected.place];
    n_different += to_float(result.scales[0]) != expected.scale ? 1U : 0U;
    n_different += fit && result.offsets[0] != expected.offset ? 1U : 0U;
  }
  CHECK(n_different == 0);
  // Or the law would say little; hardly a row of halves needs the last.
  const std::size_t n_used = sizeof(T) == 2 ? 5 : 6;
  CHECK(std::all_of(n_at.begin(), n_at.begin() + n_used, [](std::size_t n) { return n > 100; }));
  CHECK(n_at.back() == 0);
}

TEST_CASE("a block of one value comes back within half a step, whatever the value") {
  for (const float value : {65504.0F, -65504.0F, 1.0F, -0.1F, 6e-5F, 0x1p-24F, -0x1p-24F, -0.0F}) {
    for (const bool fit : {false, true}) {
      CAPTURE(value);
      CAPTURE(fit);
      const std::vector<Half> halves(33, to_half(value));
      const double weight = to_float(halves[0]);
      const auto result = run<Half, std::uint8_t>(halves, 1, {0, 254}, fit);
      const double decoded = to_float(result.decoded[0]);
      CHECK(std::isfinite(decoded));
      CHECK(std::abs(weight - decoded) <=
            bound_of<Half>(weight, decoded, to_float(result.scales[0])));
      CHECK(std::all_of(result.codes.begin(), result.codes.end(),
                        [&](std::uint8_t code) { return code == result.codes[0]; }));
    }
  }
}

template <typename T>
double squared_error(const std::vector<T>& weights, const std::vector<T>& decoded,
                     std::size_t begin, std::size_t end) {
  double sum = 0;
  for (std::size_t i = begin; i < end; ++i) {
    const double error = double{to_float(weights[i])} - to_float(decoded[i]);
    sum += error * error;
  }
  return sum;
}

template <typename T, typename Code>
void check_never_worse(CodeRange range, bool fit) {
  CAPTURE(range.code_min);
  CAPTURE(range.code_max);
  CAPTURE(fit);
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  constexpr float kMax = sizeof(T) == 2 ? 65504.0F : std::numeric_limits<float>::max();
  constexpr float kMin = sizeof(T) == 2 ? 0x1p-24F : 0x1p-149F;
  std::size_t n_broken = 0;
  std::size_t n_better = 0;
  for (const float magnitude : {kMax, kMax / 2, 1.0F, 1e-4F, 40 * kMin, 3 * kMin}) {
    for (const std::size_t n_cols : {1U, 2U, 31U, 32U, 33U, 70U, 2047U, 2049U, 4100U}) {
      const std::size_t n_rows = 5;
      std::vector<T> weights(n_rows * n_cols);
      for (std::size_t i = 0; i < weights.size(); ++i) {
        const float value = i % 7 == 0 ? normal(random) : normal(random) / 4 + (fit ? 0.5F : 0.0F);
        weights[i] = from_float<T>(std::clamp(value, -1.0F, 1.0F) * magnitude);
      }
      const auto plain = run<T, Code>(weights, n_rows, range, fit);
      const auto searched = run<T, Code>(weights, n_rows, range, fit, Range::kSearched);
      for (std::size_t row = 0; row < n_rows; ++row) {
        const std::size_t begin = row * n_cols;
        const double before = squared_error(weights, plain.decoded, begin, begin + n_cols);
        const double after = squared_error(weights, searched.decoded, begin, begin + n_cols);
        // The kernel adds up in another order: n roundings of a double at most.
        const double slack = 1 + static_cast<double>(n_cols) * 0x1p-53;
        n_broken += std::isfinite(after) && after <= before * slack ? 0U : 1U;
        n_better += after < before ? 1U : 0U;
      }
      n_broken +=
          std::all_of(searched.codes.begin(), searched.codes.end(),
                      [&](int code) { return code >= range.code_min && code <= range.code_max; })
              ? 0U
              : 1U;
    }
  }
  CHECK(n_broken == 0);
  CHECK(n_better > 40);  // of 270, or the law would say little
}

TEST_CASE("a searched range never restores a row worse than the whole range, and always finitely") {
  for (const bool fit : {false, true}) {
    for (const CodeRange range : {CodeRange{-8, 7}, CodeRange{-7, 7}, CodeRange{-128, 127},
                                  CodeRange{-127, 127}, CodeRange{-2, 1}}) {
      check_never_worse<Half, std::int8_t>(range, fit);
      check_never_worse<float, std::int8_t>(range, fit);
    }
    for (const CodeRange range : {CodeRange{0, 15}, CodeRange{0, 14}, CodeRange{0, 255}}) {
      check_never_worse<Half, std::uint8_t>(range, fit);
      check_never_worse<float, std::uint8_t>(range, fit);
    }
  }
}

TEST_CASE("the greatest magnitude takes the lowest code, whatever its sign") {
  for (const float scale : {0.25F, -0.25F}) {
    std::vector<Half> weights;
    for (int code = -8; code <= 7; ++code) {
      weights.push_back(to_half(scale * static_cast<float>(code)));
    }
    const auto result = run<Half, std::int8_t>(weights, 1, {-8, 7}, false, Range::kSearched);
    CHECK(to_float(result.scales[0]) == scale);
    CHECK(result.codes.front() == -8);
    CHECK(result.decoded == weights);
  }
}

TEST_CASE_TEMPLATE("a searched row of one value comes back but for two roundings", T, Half, float) {
  const double place = sizeof(T) == 2 ? 0x1p-11 : 0x1p-24;  // half a last place
  for (const float value : {0.1F, -0.1F, 3.3F, 60000.0F, -60000.0F}) {
    CAPTURE(value);
    for (const CodeRange range : {CodeRange{-8, 7}, CodeRange{-7, 7}, CodeRange{-2, 1}}) {
      const std::vector<T> weights(33, from_float<T>(value));
      const auto result = run<T, std::int8_t>(weights, 1, range, false, Range::kSearched);
      // Least squares gives the value over its code, rounded, and decoding rounds the product.
      const double weight = to_float(weights[0]);
      CHECK(std::abs(to_float(result.decoded[0]) - weight) <=
            2 * (1 + place) * place * std::abs(weight));
    }
  }
}

TEST_CASE("one outlier among many weights is clipped") {
  std::vector<float> weights(1000);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    weights[i] = std::sin(static_cast<float>(i));
  }
  weights[500] = 2;
  for (const bool fit : {false, true}) {
    const auto result = run<float, std::int8_t>(weights, 1, {-7, 7}, fit, Range::kSearched);
    CHECK(result.decoded[500] < 1.9F);
    CHECK(squared_error(weights, result.decoded, 0, 1000) <
          0.7 * squared_error(weights, run<float, std::int8_t>(weights, 1, {-7, 7}, fit).decoded, 0,
                              1000));
  }
}

TEST_CASE_TEMPLATE("a searched row of zeros has scale 1, one that is not finite a scale of NaN", T,
                   Half, float) {
  for (const bool fit : {false, true}) {
    for (const std::size_t n_cols : {1U, 33U, 2049U}) {
      std::vector<T> weights(3 * n_cols);
      weights[n_cols / 2] = from_float<T>(-0.0F);
      weights[2 * n_cols - 1] = from_float<T>(INFINITY);
      weights[3 * n_cols - 1] = from_float<T>(-NAN);
      const auto result = run<T, std::int8_t>(weights, 3, {-8, 7}, fit, Range::kSearched);
      CHECK(to_float(result.scales[0]) == 1);
      CHECK(std::all_of(result.decoded.begin(), result.decoded.begin() + n_cols,
                        [](T weight) { return to_float(weight) == 0; }));
      CHECK(std::isnan(to_float(result.scales[1])));
      CHECK(std::isnan(to_float(result.scales[2])));
    }
  }
}

template <typename T, typename Code>
Result<T, Code> run_weighted(const std::vector<T>& weights, const std::vector<float>& importance,
                             std::size_t n_rows, CodeRange range, bool fit) {
  const std::size_t n_cols = weights.size() / n_rows;
  Result<T, Code> result{std::vector<T>(n_rows), std::vector<Code>(fit ? n_rows : 0),
                         std::vector<Code>(weights.size()), std::vector<T>(weights.size())};
  quantize_mse<T, Code>({weights.data(), n_rows, n_cols}, {importance.data(), n_rows, n_cols},
                        range, result.scales, result.offsets,
                        {result.codes.data(), n_rows, n_cols});
  dequantize<T, Code>({result.codes.data(), n_rows, n_cols}, result.scales, result.offsets,
                      {result.decoded.data(), n_rows, n_cols});
  return result;
}

template <typename T>
void check_weighted(std::size_t n_rows, std::size_t n_cols, CodeRange range, bool fit) {
  CAPTURE(n_cols);
  CAPTURE(fit);
  std::mt19937 random(static_cast<unsigned>(n_cols));
  std::normal_distribution<float> normal(fit ? 0.5F : 0.0F, 1.0F);
  std::vector<T> weights(n_rows * n_cols);
  std::generate(weights.begin(), weights.end(), [&] { return from_float<T>(normal(random)); });
  std::vector<float> importance(weights.size());
  std::generate(importance.begin(), importance.end(), [&] {
    return static_cast<float>(random() % 4) * static_cast<float>(random() % 2);
  });
  // Both ends of a row decide which ranges are tried. Other weights without importance don't count.
  std::vector<T> others = weights;
  for (std::size_t i = 0; i < others.size(); ++i) {
    if (i % n_cols < 2) {
      weights[i] = others[i] = from_float<T>(i % n_cols == 0 ? 6.0F : -5.0F);
    } else if (importance[i] == 0) {
      others[i] = from_float<T>(4 * std::sin(static_cast<float>(i)));
    }
  }
  const auto result = run_weighted<T, std::int8_t>(weights, importance, n_rows, range, fit);
  const auto same = run_weighted<T, std::int8_t>(others, importance, n_rows, range, fit);
  CHECK(result.scales == same.scales);
  CHECK(result.offsets == same.offsets);

  std::vector<float> scaled = importance;
  std::for_each(scaled.begin(), scaled.end(), [](float& share) { share *= 0x1p-30F; });
  CHECK(run_weighted<T, std::int8_t>(weights, scaled, n_rows, range, fit).codes == result.codes);
  const auto even = run_weighted<T, std::int8_t>(weights, std::vector<float>(weights.size(), 1.0F),
                                                 n_rows, range, fit);
  const auto searched = run<T, std::int8_t>(weights, n_rows, range, fit, Range::kSearched);
  CHECK(even.scales == searched.scales);
  CHECK(even.offsets == searched.offsets);
  CHECK(even.codes == searched.codes);

  const auto error = [&](const Result<T, std::int8_t>& of, std::size_t row) {
    double sum = 0;
    for (std::size_t i = row * n_cols; i < (row + 1) * n_cols; ++i) {
      const double difference = double{to_float(weights[i])} - to_float(of.decoded[i]);
      sum += importance[i] * difference * difference;
    }
    return sum;
  };
  const auto plain = run<T, std::int8_t>(weights, n_rows, range, fit);
  for (std::size_t row = 0; row < n_rows; ++row) {
    const double slack = 1 + static_cast<double>(n_cols) * 0x1p-53;
    CHECK(error(result, row) <= error(plain, row) * slack);
  }
}

TEST_CASE_TEMPLATE("a searched range is that of the weights with importance, by their shares", T,
                   Half, float) {
  for (const bool fit : {false, true}) {
    check_weighted<T>(40, 33, {-8, 7}, fit);
    check_weighted<T>(4, 2049, {-8, 7}, fit);
    check_weighted<T>(2, 4500, {-7, 7}, fit);
    check_weighted<T>(1, 140'000, {-8, 7}, fit);
  }
}

TEST_CASE("a searched range is the same on one thread and on two, giant rows included") {
  for (const std::size_t n_rows : {1U, 3U, 6000U}) {
    std::vector<Half> weights(600'000);
    std::mt19937 random(9);
    std::normal_distribution<float> normal;
    std::generate(weights.begin(), weights.end(), [&] { return to_half(normal(random)); });
    for (const bool fit : {false, true}) {
      const std::size_t before = set_thread_limit(1);
      const auto one = run<Half, std::int8_t>(weights, n_rows, {-8, 7}, fit, Range::kSearched);
      set_thread_limit(2);
      const auto two = run<Half, std::int8_t>(weights, n_rows, {-8, 7}, fit, Range::kSearched);
      set_thread_limit(before);
      CHECK(one.scales == two.scales);
      CHECK(one.offsets == two.offsets);
      CHECK(one.codes == two.codes);
    }
  }
}

TEST_CASE("dequantize is scale times code minus offset, rounded once") {
  for (const std::size_t n_cols : {1U, 31U, 2049U, 70'000U}) {
    std::vector<std::int8_t> codes(3 * n_cols);
    for (std::size_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<std::int8_t>(static_cast<int>(i * 37 % 256) - 128);
    }
    const std::vector<Half> scales{to_half(0.0123F), Half{1}, to_half(600.0F)};
    const std::vector<std::int8_t> offsets{-128, 5, 127};
    std::vector<Half> weights(codes.size());
    dequantize<Half, std::int8_t>({codes.data(), 3, n_cols}, scales, offsets,
                                  {weights.data(), 3, n_cols});
    std::size_t n_wrong = 0;
    for (std::size_t i = 0; i < codes.size(); ++i) {
      // The product of an 11-bit and a 9-bit number is exact in a float.
      const float product =
          to_float(scales[i / n_cols]) * static_cast<float>(codes[i] - offsets[i / n_cols]);
      n_wrong += weights[i] == to_half(product) ? 0U : 1U;
    }
    CHECK(n_wrong == 0);
  }
}

TEST_CASE_TEMPLATE("a row of zeros has scale 1, the offset nearest to 0, and decodes to zeros", T,
                   Half, float) {
  for (const Range of_row : {Range::kWhole, Range::kSearched}) {
    for (const auto& [range, offset] : std::vector<std::pair<CodeRange, int>>{
             {{-128, 127}, 0}, {{-8, 7}, 0}, {{3, 15}, 3}, {{-15, -4}, -4}}) {
      CAPTURE(range.code_min);
      const auto result = run<T, std::int8_t>(std::vector<T>(40), 2, range, true, of_row);
      CHECK(result.scales == std::vector<T>(2, from_float<T>(1)));
      CHECK(result.offsets == std::vector<std::int8_t>(2, static_cast<std::int8_t>(offset)));
      CHECK(result.codes == std::vector<std::int8_t>(40, static_cast<std::int8_t>(offset)));
      CHECK(result.decoded == std::vector<T>(40));
    }
    const auto middle = run<T, std::uint8_t>(std::vector<T>(40), 2, {0, 254}, false, of_row);
    CHECK(middle.scales == std::vector<T>(2, from_float<T>(1)));
    CHECK(middle.codes == std::vector<std::uint8_t>(40, 127));
    CHECK(middle.decoded == std::vector<T>(40));
  }
}

TEST_CASE_TEMPLATE("a row of one value with an offset takes the whole range, from zero to it", T,
                   Half, float) {
  const double place = sizeof(T) == 2 ? 0x1p-11 : 0x1p-24;  // half a last place
  for (const Range of_row : {Range::kWhole, Range::kSearched}) {
    for (const float value : {0.1F, -0.1F, 1.0F, -1.0F, 31.875F, -31.875F, 60000.0F, -60000.0F}) {
      CAPTURE(value);
      for (const CodeRange range : {CodeRange{-128, 127}, CodeRange{-8, 7}}) {
        const std::vector<T> weights(33, from_float<T>(value));
        const auto result = run<T, std::int8_t>(weights, 1, range, true, of_row);
        const int zero = value > 0 ? range.code_min : range.code_max;
        const int outermost = value > 0 ? range.code_max : range.code_min;
        CHECK(result.offsets[0] == zero);
        CHECK(result.codes == std::vector<std::int8_t>(33, static_cast<std::int8_t>(outermost)));
        // The scale is rounded, and so is the product.
        const double weight = to_float(weights[0]);
        CHECK(std::abs(to_float(result.decoded[0]) - weight) <=
              2 * (1 + place) * place * std::abs(weight));
        if (std::abs(value) == 31.875F) {  // 255 eighths, or 15 times 17 of them
          CHECK(result.decoded == weights);
        }
      }
    }
  }
}

TEST_CASE("a row that is not finite is known by its scale") {
  for (const std::uint16_t bits : {0x7c00, 0xfc00, 0x7e00, 0xfe00}) {
    std::vector<Half> weights(40, to_half(0.5F));
    weights[25] = Half{bits};
    const auto result = run<Half, std::int8_t>(weights, 2, {-7, 7}, false);
    CHECK(to_float(result.scales[0]) > 0);
    CHECK(std::isnan(to_float(result.scales[1])));
  }
}

TEST_CASE_TEMPLATE("one bad weight anywhere makes the scale NaN and leaves codes within the range",
                   T, Half, float) {
  for (const std::size_t n_cols : {1U, 31U, 2048U, 2049U, 4U * 131'072 + 5}) {
    for (const std::size_t place : {std::size_t{0}, n_cols / 2, n_cols - 1}) {
      for (const float bad : {INFINITY, -INFINITY, NAN, -NAN}) {
        if (n_cols > 4000 && std::isinf(bad)) {
          continue;  // the extremes are found alike, and giant rows take their time
        }
        for (const bool fit : {false, true}) {
          std::vector<T> weights(n_cols, from_float<T>(0.5F));
          weights[place] = from_float<T>(bad);
          const auto result = run<T, std::int8_t>(weights, 1, {-7, 7}, fit);
          CHECK(std::isnan(to_float(result.scales[0])));
          const auto [least, greatest] =
              std::minmax_element(result.codes.begin(), result.codes.end());
          CHECK(*least >= -7);
          CHECK(*greatest <= 7);
        }
      }
    }
  }
}

template <typename T, typename Code>
void check_giant(CodeRange range, bool fit) {
  std::vector<T> weights(4 * 131072 + 5);
  std::mt19937 random(5);
  for (T& weight : weights) {
    weight = from_float<T>(static_cast<float>(random() % 4096) / 1024 - 2);
  }
  weights.back() = from_float<T>(3.0F);  // the extremes lie in the ragged last piece and the first
  weights.front() = from_float<T>(-3.5F);
  const std::size_t before = set_thread_limit(1);
  const auto one = run<T, Code>(weights, 1, range, fit);
  set_thread_limit(2);
  const auto two = run<T, Code>(weights, 1, range, fit);
  set_thread_limit(before);
  CHECK(one.scales == two.scales);
  CHECK(one.offsets == two.offsets);
  CHECK(one.codes == two.codes);
  CHECK(one.decoded == two.decoded);
  const Naive<T> expected = naive_codes<T>(weights, range, fit);
  REQUIRE(expected.sound);
  CHECK(to_float(one.scales[0]) == expected.scale);
  CHECK(std::equal(one.codes.begin(), one.codes.end(), expected.codes.begin(),
                   [](Code a, float b) { return static_cast<float>(a) == b; }));
}

TEST_CASE("a giant row is coded like any other, on one thread and on two") {
  check_giant<Half, std::uint8_t>({0, 255}, true);
  check_giant<float, std::int8_t>({-127, 127}, false);
}

TEST_CASE_TEMPLATE("a giant row has the scale and codes of a short one, whatever its magnitude", T,
                   Half, float) {
  constexpr float kMax = sizeof(T) == 2 ? 65504.0F : std::numeric_limits<float>::max();
  constexpr float kMin = sizeof(T) == 2 ? 0x1p-24F : 0x1p-149F;
  std::mt19937 random(13);
  std::uniform_real_distribution<float> unit(-1.0F, 1.0F);
  for (const float magnitude : {kMax, 1.0F, 300 * kMin}) {
    CAPTURE(magnitude);
    std::vector<T> part(1001, from_float<T>(magnitude));
    std::generate(part.begin() + 1, part.end(),
                  [&] { return from_float<T>(magnitude * unit(random)); });
    std::vector<T> weights(4 * 131072 + 5);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      weights[i] = part[i % part.size()];
    }
    for (const bool fit : {false, true}) {
      const auto expected = run<T, std::int8_t>(part, 1, {-127, 127}, fit);
      const auto result = run<T, std::int8_t>(weights, 1, {-127, 127}, fit);
      CHECK(result.scales == expected.scales);
      CHECK(result.offsets == expected.offsets);
      std::size_t n_different = 0;
      for (std::size_t i = 0; i < weights.size(); ++i) {
        n_different += result.codes[i] == expected.codes[i % part.size()] ? 0U : 1U;
      }
      CHECK(n_different == 0);
    }
  }
}

TEST_CASE("shapes and ranges that don't fit are refused") {
  const std::vector<Half> weights(8);
  std::vector<Half> scales(2);
  std::vector<std::int8_t> codes(8);
  const MatrixView<const Half> in{weights.data(), 2, 4};
  const MatrixView<std::int8_t> out{codes.data(), 2, 4};
  const std::span<std::int8_t> none;
  using Scales = std::span<Half>;
  CHECK_THROWS_AS(quantize(in, {-200, 7}, Scales(scales), none, out), std::invalid_argument);
  CHECK_THROWS_AS(quantize(in, {7, -7}, Scales(scales), none, out), std::invalid_argument);
  CHECK_THROWS_AS(quantize_mse(in, {}, {7, -7}, Scales(scales), none, out), std::invalid_argument);
  const std::vector<float> share(8);
  CHECK_THROWS_AS(quantize_mse(in, {share.data(), 4, 2}, {-7, 7}, Scales(scales), none, out),
                  std::invalid_argument);
  CHECK_THROWS_AS(quantize(in, {3, 3}, Scales(scales), none, out), std::invalid_argument);
  CHECK_THROWS_AS(quantize(in, {0, 128}, Scales(scales), none, out), std::invalid_argument);
  CHECK_THROWS_AS(quantize(in, {-7, 7}, Scales(scales).first(1), none, out), std::invalid_argument);
  std::vector<std::int8_t> one_offset(1);
  const std::span<std::int8_t> short_offsets(one_offset);
  CHECK_THROWS_AS(quantize(in, {-7, 7}, Scales(scales), short_offsets, out), std::invalid_argument);
  const MatrixView<std::int8_t> turned{codes.data(), 4, 2};
  CHECK_THROWS_AS(quantize(in, {-7, 7}, Scales(scales), none, turned), std::invalid_argument);
  std::vector<std::uint8_t> bytes(8);
  CHECK_THROWS_AS(quantize(in, {-1, 7}, Scales(scales), std::span<std::uint8_t>(),
                           MatrixView<std::uint8_t>{bytes.data(), 2, 4}),
                  std::invalid_argument);

  std::vector<Half> dense(8);
  const auto decode = [&](std::size_t n_scales, std::size_t n_offsets, std::size_t n_rows) {
    dequantize<Half, std::int8_t>({codes.data(), 2, 4}, Scales(scales).first(n_scales),
                                  std::span(codes).first(n_offsets),
                                  {dense.data(), n_rows, 8 / n_rows});
  };
  CHECK_NOTHROW(decode(2, 2, 2));
  CHECK_THROWS_AS(decode(1, 2, 2), std::invalid_argument);
  CHECK_THROWS_AS(decode(2, 1, 2), std::invalid_argument);
  CHECK_THROWS_AS(decode(2, 2, 4), std::invalid_argument);
}

TEST_CASE("rows without weights get scale 1 and the offset of zero") {
  std::vector<Half> scales(2);
  std::vector<std::uint8_t> offsets(2, 9);
  quantize<Half, std::uint8_t>({nullptr, 2, 0}, {0, 255}, scales, offsets, {nullptr, 2, 0});
  CHECK(to_float(scales[1]) == 1);
  CHECK(offsets[1] == 0);
  quantize<Half, std::uint8_t>({nullptr, 0, 5}, {0, 255}, {}, {}, {nullptr, 0, 5});
  quantize_mse<Half, std::uint8_t>({nullptr, 0, 5}, {}, {0, 255}, {}, {}, {nullptr, 0, 5});
}

TEST_CASE("the comparison counts exactly the codes that were shifted") {
  std::vector<Half> weights(3 * 700);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    weights[i] = to_half(std::sin(static_cast<float>(i)));
  }
  auto result = run<Half, std::int8_t>(weights, 3, {-127, 127}, false);
  const auto judged = [&] {
    return compare_quantized<Half, std::int8_t>({weights.data(), 3, 700},
                                                {result.codes.data(), 3, 700}, result.scales, {});
  };
  CHECK(judged().n_outside == 0);
  double noise = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const double error = to_float(weights[i]) - to_float(result.decoded[i]);
    noise += error * error;
  }
  // Sums of 1,024 squares in float32 are good to 1024 * 2^-24.
  CHECK(judged().noise == doctest::Approx(noise).epsilon(1024 * 0x1p-24));
  for (const std::size_t i : {0U, 699U, 700U, 1023U, 1024U, 2099U}) {
    result.codes[i] =
        static_cast<std::int8_t>(result.codes[i] > 0 ? result.codes[i] - 3 : result.codes[i] + 3);
  }
  CHECK(judged().n_outside == 6);
}

}  // namespace
}  // namespace milpress
