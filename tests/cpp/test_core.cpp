#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "core/convert.h"
#include "core/half.h"
#include "core/order.h"
#include "core/parallel.h"

namespace milpress {
namespace {

// What the bits of a half mean, from the definition of binary16.
double value_of(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const double fraction = (bits & 1023) / 1024.0;
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == 31) {
    return fraction == 0 ? sign * std::numeric_limits<double>::infinity() : std::nan("");
  }
  return sign *
         (exponent == 0 ? std::ldexp(fraction, -14) : std::ldexp(1 + fraction, exponent - 15));
}

TEST_CASE("every half has the value that its bits mean") {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const auto half = Half{static_cast<std::uint16_t>(bits)};
    const double expected = value_of(half.bits);
    if (std::isnan(expected)) {
      CHECK(std::isnan(to_float(half)));
    } else {
      REQUIRE(static_cast<double>(to_float(half)) == expected);
      REQUIRE(to_half(to_float(half)) == half);
    }
  }
}

TEST_CASE("a float between two halves goes to the nearer, a tie to the even one") {
  for (unsigned bits = 0; bits < 0x7bff; ++bits) {
    const double low = value_of(static_cast<std::uint16_t>(bits));
    const double high = value_of(static_cast<std::uint16_t>(bits + 1));
    const auto middle = static_cast<float>((low + high) / 2);
    REQUIRE(to_half(middle).bits == bits + (bits & 1U));
    REQUIRE(to_half(std::nextafter(middle, 0.0F)).bits == bits);
    REQUIRE(to_half(-std::nextafter(middle, 1e9F)).bits == (0x8000U | (bits + 1)));
  }
  CHECK(to_half(65519.0F).bits == 0x7bff);
  CHECK(to_half(65520.0F).bits == 0x7c00);
  CHECK(to_half(-1e30F).bits == 0xfc00);
  CHECK(std::isnan(to_float(to_half(std::nanf("")))));
}

TEST_CASE("the processor's conversions agree with the plain ones at every length and alignment") {
  std::vector<Half> halves(48);
  std::vector<float> values(48);
  for (std::size_t i = 0; i < halves.size(); ++i) {
    halves[i] = Half{static_cast<std::uint16_t>(i * 2731 % 0x7c00 + (i % 2) * 0x8000)};
    values[i] = std::ldexp(1.0F + static_cast<float>(i) / 48, static_cast<int>(i) - 26);
  }
  for (std::size_t begin = 0; begin < 8; ++begin) {
    for (std::size_t n = 0; n <= 40; ++n) {
      std::vector<float> wide(n), wide_plain(n);
      widen(halves.data() + begin, n, wide.data());
      widen_plain(halves.data() + begin, n, wide_plain.data());
      REQUIRE(wide == wide_plain);
      std::vector<Half> thin(n), thin_plain(n);
      narrow(values.data() + begin, n, thin.data());
      narrow_plain(values.data() + begin, n, thin_plain.data());
      REQUIRE(thin == thin_plain);
    }
  }
}

TEST_CASE("order keys ascend with the values and lead back to them") {
  float before = -std::numeric_limits<float>::infinity();
  for (int key = order_key(Half{0xfc00}); key <= order_key(Half{0x7c00}); ++key) {
    const Half half = value_at(static_cast<std::int16_t>(key));
    REQUIRE(to_float(half) >= before);
    REQUIRE(order_key(half) == key);
    REQUIRE(value_at(order_key(to_float(half))) == to_float(half));
    before = to_float(half);
  }
}

TEST_CASE("every index is visited once, in the same pieces on any number of threads") {
  for (const std::size_t threads : {1U, 2U, 5U}) {
    const std::size_t before = set_thread_limit(threads);
    for (const std::size_t n : {0U, 1U, 7U, 64U, 1000U}) {
      for (const std::size_t grain : {1U, 3U, 64U, 5000U}) {
        std::vector<std::atomic<int>> visits(n);
        parallel_for(n, grain, [&](std::size_t begin, std::size_t end) {
          CHECK(begin % grain == 0);
          CHECK(end == std::min(begin + grain, n));
          for (std::size_t i = begin; i < end; ++i) {
            ++visits[i];
          }
        });
        for (const auto& count : visits) {
          REQUIRE(count == 1);
        }
      }
    }
    set_thread_limit(before);
  }
}

TEST_CASE("an exception of a body reaches the caller, and the threads go on serving") {
  const std::size_t before = set_thread_limit(4);
  for (int round = 0; round < 20; ++round) {
    CHECK_THROWS_AS(parallel_for(100, 1,
                                 [](std::size_t begin, std::size_t) {
                                   if (begin == 50) {
                                     throw std::runtime_error("planted");
                                   }
                                 }),
                    std::runtime_error);
    std::atomic<int> count = 0;
    parallel_for(10, 1, [&](std::size_t, std::size_t) {
      parallel_for(10, 1, [&](std::size_t, std::size_t) { ++count; });
    });
    CHECK(count == 100);
  }
  set_thread_limit(before);
}

}  // namespace
}  // namespace milpress
