#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "core/convert.h"
#include "core/half.h"
#include "core/keys.h"
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

// The nearest multiple of the last place, ties to even: binary16 rounding in exact arithmetic.
double rounded(double value) {
  const double magnitude = std::abs(value);
  const int place = magnitude < 0x1p-14 ? -24 : std::ilogb(magnitude) - 10;
  const double nearest = std::ldexp(std::nearbyint(std::ldexp(magnitude, -place)), place);
  return std::copysign(nearest >= 65536 ? std::numeric_limits<double>::infinity() : nearest, value);
}

// Bit for bit, but for the payload of a NaN.
bool same(float a, float b) {
  return std::isnan(a) || std::isnan(b)
             ? std::isnan(a) && std::isnan(b) && std::signbit(a) == std::signbit(b)
             : std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
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

TEST_CASE("a float of any bits becomes the half that exact rounding gives") {
  std::mt19937 random(1);
  std::size_t n_wrong = 0;
  for (int i = 0; i < 1'000'000; ++i) {
    // Half of them of an exponent where halves are finite; a third with few bits, hence ties.
    std::uint32_t bits = random();
    bits = i % 2 == 0 ? (bits & 0x807fffffU) | (100 + random() % 45) << 23 : bits;
    bits = i % 3 == 0 ? bits & 0xfffff000U : bits;
    const float value = std::bit_cast<float>(bits);
    const float expected =
        std::isfinite(value) ? static_cast<float>(rounded(double{value})) : value;
    n_wrong += same(to_float(to_half(value)), expected) ? 0U : 1U;
  }
  CHECK(n_wrong == 0);
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float value : {infinity, -infinity, std::nanf(""), -std::nanf(""), 0.0F, -0.0F}) {
    CHECK(same(to_float(to_half(value)), value));
  }
}

TEST_CASE("a NaN keeps sign and payload both ways, and becomes quiet") {
  for (unsigned payload = 1; payload < 1024; ++payload) {
    for (const unsigned sign : {0U, 0x8000U}) {
      const auto half = Half{static_cast<std::uint16_t>(sign | 0x7c00U | payload)};
      const std::uint32_t wide = std::bit_cast<std::uint32_t>(to_float(half));
      REQUIRE(wide == (sign << 16 | 0x7fc00000U | payload << 13));
      REQUIRE(to_half(std::bit_cast<float>(wide | 0x1fffU)).bits == (half.bits | 0x200U));
    }
  }
  // A payload in bits that a half doesn't have must not turn NaN into infinity.
  CHECK(to_half(std::bit_cast<float>(0xff800001U)).bits == 0xfe00U);
}

// All halves, and the floats at and beside every half and every tie between two.
struct Conversions {
  std::vector<Half> halves;
  std::vector<float> values;

  Conversions() {
    for (unsigned bits = 0; bits < 65536; ++bits) {
      halves.push_back(Half{static_cast<std::uint16_t>(bits)});
      const auto at = std::bit_cast<std::uint32_t>(to_float_plain(halves.back()));
      for (const std::uint32_t step : {0U, 1U, 0xfffU, 0x1000U, 0x1001U, 0x1fffU}) {
        values.push_back(std::bit_cast<float>(at + step));
      }
    }
    std::mt19937 random(4);
    for (int i = 0; i < 300'000; ++i) {
      values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
    }
  }
};

bool same_bits(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

TEST_CASE("the processor's conversions give the bits of the plain ones for all halves and ties") {
  const Conversions data;
  std::vector<float> wide(data.halves.size()), wide_plain(data.halves.size());
  widen(data.halves.data(), wide.size(), wide.data());
  widen_plain(data.halves.data(), wide.size(), wide_plain.data());
  CHECK(std::equal(wide.begin(), wide.end(), wide_plain.begin(), same_bits));
  std::transform(data.halves.begin(), data.halves.end(), wide.begin(),
                 [](Half half) { return to_float(half); });
  CHECK(std::equal(wide.begin(), wide.end(), wide_plain.begin(), same_bits));

  std::vector<Half> thin(data.values.size()), thin_plain(data.values.size());
  narrow(data.values.data(), thin.size(), thin.data());
  narrow_plain(data.values.data(), thin.size(), thin_plain.data());
  CHECK(thin == thin_plain);
  std::transform(data.values.begin(), data.values.end(), thin.begin(),
                 [](float value) { return to_half(value); });
  CHECK(thin == thin_plain);
}

TEST_CASE("the processor's conversions give the bits of the plain ones at any length and place") {
  const Conversions data;
  std::mt19937 random(5);
  for (int round = 0; round < 20; ++round) {
    std::vector<Half> halves(48);
    std::vector<float> values(48);
    for (std::size_t i = 0; i < halves.size(); ++i) {
      halves[i] = data.halves[random() % data.halves.size()];
      values[i] = data.values[random() % data.values.size()];
    }
    for (std::size_t begin = 0; begin < 8; ++begin) {
      for (std::size_t n = 0; n <= 40; ++n) {
        // One element more than is written, to see that it stays.
        std::vector<float> wide(n + 1, 3), wide_plain(n + 1, 3);
        widen(halves.data() + begin, n, wide.data());
        widen_plain(halves.data() + begin, n, wide_plain.data());
        REQUIRE(std::equal(wide.begin(), wide.end(), wide_plain.begin(), same_bits));
        std::vector<Half> thin(n + 1, Half{3}), thin_plain(n + 1, Half{3});
        narrow(values.data() + begin, n, thin.data());
        narrow_plain(values.data() + begin, n, thin_plain.data());
        REQUIRE(thin == thin_plain);
      }
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

TEST_CASE("order keys of all bits ascend from -NaN to +NaN and are invertible") {
  for (int key = -32768; key < 32768; ++key) {
    const Half half = value_at(static_cast<std::int16_t>(key));
    REQUIRE(order_key(half) == key);
    REQUIRE(magnitude_bits(half) == (half.bits & 0x7fff));
    // By value as by rank: NaNs lie beyond the infinities, negative zero below zero.
    REQUIRE(std::isnan(to_float(half)) == (key > 0x7c00 || key < -0x7c01));
  }
  CHECK(order_key(Half{0x8000}) == -1);
  std::mt19937 random(2);
  for (int i = 0; i < 100'000; ++i) {
    const float a = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    const float b = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    REQUIRE(std::bit_cast<std::uint32_t>(value_at(order_key(a))) ==
            std::bit_cast<std::uint32_t>(a));
    REQUIRE((std::isnan(a) || std::isnan(b) || (a < b) == (order_key(a) < order_key(b))));
  }
  CHECK(order_key(-0.0F) == order_key(0.0F) - 1);
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

TEST_CASE("no index means no call, and a grain of none counts as one") {
  int n_calls = 0;
  parallel_for(0, 8, [&](std::size_t, std::size_t) { ++n_calls; });
  CHECK(n_calls == 0);
  std::atomic<int> n_indices = 0;
  parallel_for(3, 0, [&](std::size_t begin, std::size_t end) {
    n_indices += static_cast<int>(end - begin);
  });
  CHECK(n_indices == 3);
}

TEST_CASE("a call from within a body stays on the thread that makes it, in order") {
  const std::size_t before = set_thread_limit(5);
  std::atomic<int> n_elsewhere = 0;
  parallel_for(3, 1, [&](std::size_t, std::size_t) {
    const std::thread::id caller = std::this_thread::get_id();
    std::size_t next = 0;
    parallel_for(30, 7, [&](std::size_t begin, std::size_t end) {
      n_elsewhere += std::this_thread::get_id() != caller || begin != next ? 1 : 0;
      next = end;
      // Long enough for an idle thread to take a piece, were it offered one.
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    });
    n_elsewhere += next == 30 ? 0 : 1;
  });
  CHECK(n_elsewhere == 0);
  set_thread_limit(before);
}

TEST_CASE("where every body throws, one exception arrives, on any number of threads") {
  for (const std::size_t threads : {1U, 2U, 5U}) {
    const std::size_t before = set_thread_limit(threads);
    std::atomic<int> n_calls = 0;
    CHECK_THROWS_AS(parallel_for(64, 1,
                                 [&](std::size_t, std::size_t) {
                                   ++n_calls;
                                   throw std::out_of_range("planted");
                                 }),
                    std::out_of_range);
    CHECK(n_calls >= 1);
    std::atomic<int> n_after = 0;
    parallel_for(64, 1, [&](std::size_t, std::size_t) { ++n_after; });
    CHECK(n_after == 64);
    set_thread_limit(before);
  }
}

TEST_CASE("a thread limit is the thread's own, tells what it replaced, and 0 takes it back") {
  const std::size_t before = set_thread_limit(0);
  const std::size_t by_default = thread_limit();
  CHECK(by_default >= 1);
  CHECK(set_thread_limit(3) == 0);
  CHECK(thread_limit() == 3);
  std::thread([&] { CHECK(thread_limit() == by_default); }).join();
  CHECK(set_thread_limit(0) == 3);
  CHECK(thread_limit() == by_default);
  set_thread_limit(before);
}

}  // namespace
}  // namespace milpress
