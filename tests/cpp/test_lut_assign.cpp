#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "core/half.h"
#include "core/parallel.h"
#include "kernels/fidelity.h"
#include "kernels/lut_assign.h"

namespace milpress {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The first nearest entry, in double: exact for halves, and for floats of nearby exponents.
std::size_t nearest_entry(float weight, const std::vector<float>& lut) {
  if (std::isnan(weight)) {
    return 0;
  }
  if (std::isinf(weight)) {
    return weight < 0 ? 0 : lut.size() - 1;
  }
  std::size_t best = 0;
  for (std::size_t j = 1; j < lut.size(); ++j) {
    if (std::abs(double{weight} - lut[j]) < std::abs(double{weight} - lut[best])) {
      best = j;
    }
  }
  return best;
}

template <typename T>
std::vector<T> from_floats(const std::vector<float>& values) {
  std::vector<T> result;
  std::transform(values.begin(), values.end(), std::back_inserter(result), from_float<T>);
  return result;
}

template <typename T>
std::vector<float> to_floats(const std::vector<T>& values) {
  std::vector<float> result;
  std::transform(values.begin(), values.end(), std::back_inserter(result),
                 [](T value) { return to_float(value); });
  return result;
}

template <typename T>
std::vector<std::uint8_t> assigned(const std::vector<T>& weights, const std::vector<T>& luts,
                                   std::size_t n_rows) {
  std::vector<std::uint8_t> codes(weights.size(), 0xff);
  lut_assign<T>({weights.data(), n_rows, weights.size() / n_rows},
                {luts.data(), n_rows, luts.size() / n_rows},
                {codes.data(), n_rows, weights.size() / n_rows});
  return codes;
}

// Equal entries are equally near, so values are compared; where entries differ so do their codes.
template <typename T>
std::size_t count_wrong(const std::vector<T>& weights, const std::vector<T>& luts,
                        std::size_t n_rows) {
  const std::vector<std::uint8_t> codes = assigned(weights, luts, n_rows);
  const std::size_t n_cols = weights.size() / n_rows;
  const std::size_t n_entries = luts.size() / n_rows;
  const std::vector<float> all_weights = to_floats(weights);
  const std::vector<float> all_entries = to_floats(luts);
  std::size_t wrong = 0;
  for (std::size_t row = 0; row < n_rows; ++row) {
    const std::vector<float> lut(all_entries.begin() + row * n_entries,
                                 all_entries.begin() + (row + 1) * n_entries);
    for (std::size_t i = row * n_cols; i < (row + 1) * n_cols; ++i) {
      wrong += codes[i] >= n_entries || lut[codes[i]] != lut[nearest_entry(all_weights[i], lut)];
    }
  }
  return wrong;
}

enum class Shape { kTies, kBell, kSpecial };

std::vector<float> random_weights(std::mt19937& random, std::size_t n, Shape shape) {
  std::uniform_int_distribution<int> eighths(-64, 64);
  std::normal_distribution<float> bell;
  const std::vector<float> special = {kNaN,       -kNaN,  kInfinity, -kInfinity, 0.0F,   -0.0F,
                                      5.9605e-8F, -1e-7F, 6.2e-5F,   65504,      -65504, 1.5F};
  std::vector<float> weights(n);
  for (float& weight : weights) {
    weight = shape == Shape::kTies   ? static_cast<float>(eighths(random)) / 8
             : shape == Shape::kBell ? round_to<Half>(bell(random)) + 0x1p-20F * bell(random)
                                     : special[random() % special.size()];
  }
  return weights;
}

TEST_CASE_TEMPLATE("a code names the nearest entry and ties go low", T, Half, float) {
  std::mt19937 random(1);
  for (const Shape shape : {Shape::kTies, Shape::kBell, Shape::kSpecial}) {
    for (const std::size_t k : {1, 2, 3, 4, 5, 15, 16, 17, 64, 255, 256}) {
      for (const std::size_t n :
           {0, 1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 1023, 1025, 4095, 4096, 70000}) {
        if (n == 70000 && k % 16 > 1) {
          continue;  // the oracle is slow
        }
        const std::vector<T> weights = from_floats<T>(random_weights(random, n, shape));
        // Multiples of a quarter are halfway between multiples of a half.
        std::vector<float> lut =
            random_weights(random, k, shape == Shape::kTies ? Shape::kTies : Shape::kBell);
        std::sort(lut.begin(), lut.end());
        CAPTURE(k);
        CAPTURE(n);
        CHECK(count_wrong<T>(weights, from_floats<T>(lut), 1) == 0);
      }
    }
  }
}

TEST_CASE_TEMPLATE("each row is assigned by its own lut", T, Half, float) {
  std::mt19937 random(2);
  for (const std::size_t k : {1, 4, 16, 40}) {
    for (const std::size_t n_cols : {1, 33, 5000}) {
      const std::size_t n_rows = 7;
      const std::vector<T> weights =
          from_floats<T>(random_weights(random, n_rows * n_cols, Shape::kBell));
      std::vector<float> luts = random_weights(random, n_rows * k, Shape::kBell);
      for (std::size_t row = 0; row < n_rows; ++row) {
        std::sort(luts.begin() + row * k, luts.begin() + (row + 1) * k);
      }
      CHECK(count_wrong<T>(weights, from_floats<T>(luts), n_rows) == 0);
    }
  }
}

TEST_CASE_TEMPLATE("a row longer than a piece gives the same codes on any thread count", T, Half,
                   float) {
  std::mt19937 random(3);
  const std::vector<T> weights = from_floats<T>(random_weights(random, 600'001, Shape::kBell));
  for (const std::size_t k : {3, 16, 20}) {
    std::vector<float> lut = random_weights(random, k, Shape::kBell);
    std::sort(lut.begin(), lut.end());
    const std::vector<T> entries = from_floats<T>(lut);
    const std::size_t before = set_thread_limit(1);
    const std::vector<std::uint8_t> alone = assigned(weights, entries, 1);
    set_thread_limit(3);
    CHECK(assigned(weights, entries, 1) == alone);
    set_thread_limit(before);
    CHECK(count_wrong(weights, entries, 1) == 0);
  }
}

TEST_CASE("a long row of floats, looked up by prefixes, gets the codes that its parts get") {
  std::mt19937 random(9);
  // From 1 to 2 the upper half of a float changes every 2^-7.
  for (const std::size_t per_prefix : {1U, 2U, 3U, 6U, 7U, 40U}) {
    std::vector<float> lut = {-kInfinity, -kInfinity, -2.0F, 0.0F, 0.0F};
    while (lut.size() < 62) {
      lut.push_back(1 + static_cast<float>(lut.size()) * 0x1p-7F / static_cast<float>(per_prefix));
    }
    lut.insert(lut.end(), {kInfinity, kInfinity});
    std::vector<float> weights;
    while (weights.size() < 70'000) {
      const float entry = lut[random() % lut.size()];
      const float midpoint = (entry + lut[random() % lut.size()]) / 2;
      const std::vector<float> near = random_weights(random, 4, Shape::kSpecial);
      weights.insert(weights.end(), near.begin(), near.end());
      weights.insert(weights.end(), {entry, midpoint, std::nextafter(midpoint, kInfinity),
                                     std::nextafter(midpoint, -kInfinity)});
    }
    weights.resize(70'000);
    std::vector<float> luts;
    constexpr std::size_t kRows = 10;
    for (std::size_t row = 0; row < kRows; ++row) {
      luts.insert(luts.end(), lut.begin(), lut.end());
    }
    CAPTURE(per_prefix);
    CHECK(assigned(weights, lut, 1) == assigned(weights, luts, kRows));
  }
}

TEST_CASE("every half gets its code, infinite and equal entries included") {
  std::vector<Half> weights;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    weights.push_back(Half{static_cast<std::uint16_t>(bits)});
  }
  const std::vector<std::vector<float>> luts = {
      {-1, 0, 0, 2},  {-65504, 65504},  {-0.0F, 0.0F, 0x1p-24F, 0x1p-23F},
      {65472, 65504}, {-65504, -65472},
  };
  for (std::vector<float> lut : luts) {
    for (const std::size_t k : {lut.size(), std::size_t{16}, std::size_t{40}}) {
      lut.resize(std::max(k, lut.size()), lut.back());
      CHECK(count_wrong(weights, from_floats<Half>(lut), 1) == 0);
    }
  }
  for (const std::size_t padding : {0, 10, 40}) {
    std::vector<float> lut(padding + 1, -kInfinity);
    lut.insert(lut.end(), {1, kInfinity});
    const std::vector<std::uint8_t> codes = assigned(weights, from_floats<Half>(lut), 1);
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
      const float weight = to_float(weights[bits]);
      const float expected = std::isnan(weight) ? -kInfinity : std::isinf(weight) ? weight : 1;
      REQUIRE(lut[codes[bits]] == expected);
    }
  }
}

TEST_CASE("a midpoint is below exactly the halves that are nearer to the upper entry") {
  std::mt19937 random(4);
  const auto finite = [&] {
    for (;;) {
      const Half half{static_cast<std::uint16_t>(random())};
      if (std::isfinite(to_float(half))) {
        return to_float(half);
      }
    }
  };
  std::size_t wrong = 0;
  for (int pair = 0; pair < 200; ++pair) {
    const float a = finite();
    const float b = finite();
    const std::vector<float> lut = {std::min(a, b), std::max(a, b)};
    const float midpoint = midpoint_table<float>(lut)[0];
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
      const float weight = to_float(Half{static_cast<std::uint16_t>(bits)});
      wrong += (weight > midpoint) != (2 * double{weight} > double{a} + b);
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("a midpoint of floats is the largest float at or below the true one") {
  std::mt19937 random(5);
  std::uniform_int_distribution<int> exponent(-140, -115);  // subnormals too, sums exact in double
  std::uniform_real_distribution<float> mantissa(-2, 2);
  for (int pair = 0; pair < 20'000; ++pair) {
    const float a = std::ldexp(mantissa(random), exponent(random));
    const float b = std::ldexp(mantissa(random), exponent(random));
    const std::vector<float> lut = {std::min(a, b), std::max(a, b)};
    const float midpoint = midpoint_table<float>(lut)[0];
    REQUIRE(2 * double{midpoint} <= double{a} + b);
    REQUIRE(2 * double{std::nextafter(midpoint, kInfinity)} > double{a} + b);
  }
}

TEST_CASE("a midpoint is rounded down even where double can't hold the sum") {
  const auto midpoint = [](float a, float b) {
    return midpoint_table<float>(std::vector{a, b})[0];
  };
  constexpr float kMax = std::numeric_limits<float>::max();
  CHECK(midpoint(0x1p-60F, 1) == 0.5F);
  CHECK(midpoint(-0x1p-60F, 1) == std::nextafter(0.5F, 0.0F));
  CHECK(midpoint(-1, 0x1p-60F) == -0.5F);
  CHECK(midpoint(-1, -0x1p-60F) == std::nextafter(-0.5F, -1.0F));
  CHECK(midpoint(kMax, kMax) == kMax);
  CHECK(midpoint(-kMax, kMax) == 0);
  CHECK(midpoint(0, 0x1p-149F) == 0);
  CHECK(midpoint(-0x1p-149F, 0) == -0x1p-149F);
  CHECK(midpoint(-kInfinity, 0) == -kInfinity);
  CHECK(midpoint(0, kInfinity) == kMax);
  CHECK(midpoint_table<float>(std::vector{1.0F}).empty());
}

TEST_CASE_TEMPLATE("lut_to_dense names each code's entry", T, Half, float) {
  std::mt19937 random(6);
  for (const std::size_t k : {1, 2, 16, 256}) {
    for (const std::size_t n_cols : {0, 1, 31, 70000}) {
      const std::size_t n_rows = 3;
      const std::vector<T> luts = from_floats<T>(random_weights(random, n_rows * k, Shape::kBell));
      std::vector<std::uint8_t> codes(n_rows * n_cols);
      std::generate(codes.begin(), codes.end(),
                    [&] { return static_cast<std::uint8_t>(random() % k); });
      std::vector<T> weights(codes.size());
      lut_to_dense<T>({codes.data(), n_rows, n_cols}, {luts.data(), n_rows, k},
                      {weights.data(), n_rows, n_cols});
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < codes.size(); ++i) {
        wrong += weights[i] != luts[i / n_cols * k + codes[i]];
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("a code without an entry is found wherever it stands") {
  for (const std::size_t place : {0U, 5U, 1023U, 1024U, 2048U, 2999U}) {
    std::vector<std::uint8_t> codes(3000, 3);
    codes[place] = 200;
    CHECK_NOTHROW(check_codes(codes, 201));
    CHECK_THROWS_AS(check_codes(codes, 200), std::invalid_argument);
  }
}

TEST_CASE("a half just below a midpoint is not nearest to the entry above") {
  // The midpoint of the entries is no half.
  const std::vector<Half> lut{to_half(1), to_half(1 + 3 * 0x1p-10F)};
  const std::vector<Half> weights{to_half(1 + 0x1p-10F), to_half(1 + 2 * 0x1p-10F)};
  const auto n_outside = [&](std::vector<std::uint8_t> codes) {
    return compare_palette<Half>({weights.data(), 1, 2}, {codes.data(), 1, 2}, {lut.data(), 1, 2})
        .n_outside;
  };
  CHECK(n_outside({0, 1}) == 0);
  CHECK(n_outside({1, 1}) == 1);
  CHECK(n_outside({0, 0}) == 1);
}

TEST_CASE("lut_assign and lut_to_dense refuse what they can't do") {
  const std::vector<float> weights(6);
  std::vector<float> dense(6);
  std::vector<std::uint8_t> codes(6);
  const auto assign = [&](std::vector<float> lut, std::size_t n_code_cols) {
    lut_assign<float>({weights.data(), 1, 6}, {lut.data(), 1, lut.size()},
                      {codes.data(), 1, n_code_cols});
  };
  CHECK_NOTHROW(assign({1, 1, 2}, 6));
  CHECK_THROWS_AS(assign({1, 2}, 5), std::invalid_argument);
  CHECK_THROWS_AS(assign({2, 1}, 6), std::invalid_argument);
  CHECK_THROWS_AS(assign({1, kNaN}, 6), std::invalid_argument);
  CHECK_THROWS_AS(assign({kNaN}, 6), std::invalid_argument);
  CHECK_THROWS_AS(assign({}, 6), std::invalid_argument);
  CHECK_THROWS_AS(assign(std::vector<float>(257), 6), std::invalid_argument);
  CHECK_THROWS_AS(midpoint_table<float>(std::vector<float>{}), std::invalid_argument);
  CHECK_THROWS_AS(midpoint_table<float>(std::vector<float>{1, 0}), std::invalid_argument);

  const std::vector<float> lut = {1, 2};
  const auto expand = [&](std::size_t n_rows) {
    lut_to_dense<float>({codes.data(), 1, 6}, {lut.data(), n_rows, 2}, {dense.data(), 1, 6});
  };
  CHECK_NOTHROW(expand(1));
  CHECK_THROWS_AS(expand(0), std::invalid_argument);
  codes[5] = 2;
  CHECK_THROWS_AS(expand(1), std::invalid_argument);
}

}  // namespace
}  // namespace milpress
