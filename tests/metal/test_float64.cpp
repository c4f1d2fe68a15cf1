// Doubles in integers, against the processor's own.

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "float64.h"

namespace {

using milpress::Float64;

Float64 as_float64(double value) { return {std::bit_cast<std::uint64_t>(value)}; }
std::uint64_t bits_of(double value) { return std::bit_cast<std::uint64_t>(value); }

// Of all exponents that the kernels meet, near each other or far apart, with many bits or few.
std::vector<double> operands(std::size_t n) {
  std::mt19937_64 random(1);
  std::vector<double> values{0.0, -0.0, 1.0, -1.0, 0x1p-300, 0x1.fffffffffffffp200};
  while (values.size() < n) {
    const std::uint64_t word = random();
    const int spread = word % 3 == 0 ? 2 : word % 3 == 1 ? 60 : 250;
    const int exponent = static_cast<int>(random() % (2 * spread + 1)) - spread;
    double fraction = 1 + static_cast<double>(random() >> 12) * 0x1p-52;
    if (word & 8) {
      fraction = static_cast<float>(fraction);
    } else if (word & 16) {
      fraction = 1 + static_cast<double>(random() % 16) * 0x1p-52;
    }
    values.push_back(std::ldexp(word & 4 ? fraction : -fraction, exponent));
  }
  return values;
}

std::vector<float> floats(std::size_t n) {
  std::mt19937 random(2);
  std::vector<float> values;
  while (values.size() < n) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (std::isfinite(value)) {
      values.push_back(value);
    }
  }
  for (const std::uint32_t bits : {0U, 1U, 0x80000001U, 0x7fffffU, 0x800000U, 0x7f7fffffU}) {
    values.push_back(std::bit_cast<float>(bits));
  }
  return values;
}

std::size_t n_wrong = 0;

void compare(double expected, Float64 got) { n_wrong += bits_of(expected) != got.bits ? 1 : 0; }

}  // namespace

TEST_CASE("sums, products, quotients and order are those of doubles") {
  const std::vector<double> values = operands(3000);
  n_wrong = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    for (std::size_t j = i; j < std::min(i + 200, values.size()); ++j) {
      const double a = values[i];
      const double b = values[j];
      compare(a + b, as_float64(a) + as_float64(b));
      compare(a - b, as_float64(a) - as_float64(b));
      compare(b - a, as_float64(b) - as_float64(a));
      compare(a * b, as_float64(a) * as_float64(b));
      if (b != 0) {
        compare(a / b, as_float64(a) / as_float64(b));
      }
      n_wrong += (a < b) != (as_float64(a) < as_float64(b)) ? 1 : 0;
    }
  }
  CHECK(n_wrong == 0);
}

TEST_CASE("ties between doubles go to the even one") {
  n_wrong = 0;
  for (int i = 0; i < 64; ++i) {
    const double whole = 0x1p52 + i;
    for (const double part : {0.25, 0.5, 0.75, -0.25, -0.5}) {
      compare(whole + part, as_float64(whole) + as_float64(part));
      compare(whole * (1 + part), as_float64(whole) * as_float64(1 + part));
    }
  }
  CHECK(n_wrong == 0);
}

TEST_CASE("floats become doubles and doubles floats as by a cast") {
  n_wrong = 0;
  for (const float value : floats(20'000)) {
    compare(value, milpress::to_float64(value));
  }
  const auto check = [](double value) {
    const float expected = static_cast<float>(value);
    const float got = milpress::to_float(as_float64(value));
    n_wrong += std::bit_cast<std::uint32_t>(expected) != std::bit_cast<std::uint32_t>(got) ? 1 : 0;
  };
  for (const double value : operands(20'000)) {
    check(value);
  }
  for (int i = 0; i < 4096; ++i) {
    check(1 + i * 0x1p-26);               // ties between floats
    check((1 + i * 0x1p-13) * 0x1p-140);  // and between subnormal ones
    check(std::ldexp(1.5, -170 + i % 60));
    check(std::ldexp(1 + i * 0x1p-12, 127));
    check(0x1.fffffep127 * (1 + i * 0x1p-36));
  }
  CHECK(n_wrong == 0);
}

TEST_CASE("the nearest integer is that of nearbyint, within its limits") {
  n_wrong = 0;
  const auto check = [](double value) {
    const double expected = std::clamp(std::nearbyint(value), -0x1p20, 0x1p20);
    n_wrong += milpress::round_even(as_float64(value)) == expected ? 0 : 1;
  };
  for (int i = -2000; i < 2000; ++i) {
    check(i / 8.0);
    check(i / 7.0);
  }
  for (const double value : operands(10'000)) {
    check(value);
  }
  CHECK(n_wrong == 0);
}
