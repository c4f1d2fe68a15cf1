#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "core/half.h"
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

template <typename T, typename Code>
Result<T, Code> run(const std::vector<T>& weights, std::size_t n_rows, CodeRange range, bool fit) {
  const std::size_t n_cols = weights.size() / n_rows;
  Result<T, Code> result{std::vector<T>(n_rows), std::vector<Code>(fit ? n_rows : 0),
                         std::vector<Code>(weights.size()), std::vector<T>(weights.size())};
  quantize<T, Code>({weights.data(), n_rows, n_cols}, range, result.scales, result.offsets,
                    {result.codes.data(), n_rows, n_cols});
  std::vector<Code> offsets = result.offsets;
  if (!fit && range.code_min == 0) {
    offsets.assign(n_rows, static_cast<Code>(range.code_max / 2));
  }
  dequantize<T, Code>({result.codes.data(), n_rows, n_cols}, result.scales, offsets,
                      {result.decoded.data(), n_rows, n_cols});
  return result;
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
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const float weight = to_float(weights[i]);
    const float decoded = to_float(result.decoded[i]);
    const float bound = half_step_bound<T>(weight, decoded, to_float(result.scales[i / n_cols]));
    REQUIRE(std::abs(weight - decoded) <= bound);
    REQUIRE(static_cast<int>(result.codes[i]) >= range.code_min);
    REQUIRE(static_cast<int>(result.codes[i]) <= range.code_max);
  }
}

TEST_CASE("every weight is restored within half a step, at any magnitude and row length") {
  for (const float magnitude : {65504.0F, 40000.0F, 1.0F, 7e-3F, 1e-5F, 3e-7F, 6e-8F}) {
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

TEST_CASE("codes are those of arithmetic in which every step is rounded to half") {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0F, 0.05F);
  std::vector<Half> weights(64 * 100);
  for (Half& weight : weights) {
    weight = to_half(normal(random));
  }
  const auto result = run<Half, std::int8_t>(weights, 64, {-127, 127}, false);
  for (std::size_t row = 0; row < 64; ++row) {
    float limit = 0;
    for (std::size_t i = 0; i < 100; ++i) {
      limit = std::max(limit, std::abs(to_float(weights[row * 100 + i])));
    }
    const float scale = round_to<Half>(round_to<Half>(2 * limit) / 254);
    REQUIRE(to_float(result.scales[row]) == scale);
    for (std::size_t i = row * 100; i < row * 100 + 100; ++i) {
      const float code = std::nearbyint(round_to<Half>(to_float(weights[i]) / scale));
      REQUIRE(result.codes[i] == static_cast<int>(std::clamp(code, -127.0F, 127.0F)));
    }
  }
}

TEST_CASE("a row of zeros has scale 1 and decodes to zeros") {
  for (const bool fit : {false, true}) {
    const auto result = run<Half, std::uint8_t>(std::vector<Half>(40), 2, {0, 254}, fit);
    CHECK(to_float(result.scales[0]) == 1);
    CHECK(result.decoded == std::vector<Half>(40));
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

TEST_CASE("a giant row gives the same bytes on one thread and on several") {
  std::vector<Half> weights(4 * 131072 + 5);
  std::mt19937 random(2);
  for (Half& weight : weights) {
    weight = Half{static_cast<std::uint16_t>(random() % 0x5000)};
  }
  const std::size_t before = set_thread_limit(1);
  const auto one = run<Half, std::int8_t>(weights, 1, {-128, 127}, true);
  set_thread_limit(3);
  const auto several = run<Half, std::int8_t>(weights, 1, {-128, 127}, true);
  set_thread_limit(before);
  CHECK(one.scales == several.scales);
  CHECK(one.offsets == several.offsets);
  CHECK(one.codes == several.codes);
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
  CHECK_THROWS_AS(quantize(in, {-7, 7}, Scales(scales).first(1), none, out), std::invalid_argument);
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
