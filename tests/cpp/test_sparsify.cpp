#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "core/half.h"
#include "core/order.h"
#include "kernels/fidelity.h"
#include "kernels/finite.h"
#include "kernels/pack.h"
#include "kernels/sparsify.h"

namespace milpress {
namespace {

template <typename T>
std::vector<T> tied_weights(std::size_t n) {
  std::mt19937 random(static_cast<unsigned>(n));
  std::vector<T> weights(n);
  for (T& weight : weights) {
    weight = from_float<T>(static_cast<float>(static_cast<int>(random() % 33) - 16) / 8);
  }
  return weights;
}

bool bit(const std::vector<std::uint8_t>& mask, std::size_t i) {
  return (mask[i / 8] >> i % 8 & 1) != 0;
}

template <typename T>
void check_selection(std::size_t n, std::size_t n_zeros) {
  const std::vector<T> weights = tied_weights<T>(n);
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::abs(to_float(weights[a])) < std::abs(to_float(weights[b]));
  });
  std::vector<bool> kept(n);
  for (std::size_t i = n_zeros; i < n; ++i) {
    kept[order[i]] = to_float(weights[order[i]]) != 0;
  }
  std::vector<std::uint8_t> mask((n + 7) / 8, 0xaa);
  keep_largest<T>(weights, n_zeros, mask);
  for (std::size_t i = 0; i < n; ++i) {
    REQUIRE(bit(mask, i) == kept[i]);
  }
  REQUIRE(count_kept(mask) == static_cast<std::size_t>(std::count(kept.begin(), kept.end(), true)));
  std::vector<T> nonzeros(count_kept(mask));
  compact<T>(weights, mask, nonzeros);
  std::vector<T> dense(n);
  expand<T>(mask, nonzeros, dense);
  for (std::size_t i = 0; i < n; ++i) {
    REQUIRE(to_float(dense[i]) == (kept[i] ? to_float(weights[i]) : 0.0F));
  }
  const SparseFidelity judged = compare_sparse<T>(weights, mask, nonzeros);
  CHECK(judged.fidelity.n_outside == 0);
  CHECK(judged.n_zeros == n - nonzeros.size());
  CHECK(judged.greatest_pruned <= judged.least_kept);
}

TEST_CASE("the smallest go, of equals the earlier first, and the rest comes back") {
  for (const std::size_t n : {1U, 7U, 8U, 9U, 2047U, 2048U, 2049U}) {
    for (const std::size_t n_zeros : {std::size_t{0}, std::size_t{1}, n / 3, n / 2, n - 1, n}) {
      check_selection<Half>(n, std::min(n, n_zeros));
      check_selection<float>(n, std::min(n, n_zeros));
    }
  }
  check_selection<Half>(262'145, 100'000);
  check_selection<float>(262'145, 100'000);
}

TEST_CASE("a threshold keeps what is above it and no zero of either sign") {
  const std::vector<float> weights{-0.0F, 0.0F, 0.5F, -0.5F, 0.51F, -2.0F, NAN};
  std::vector<std::uint8_t> mask(1);
  keep_above<float>(weights, 0.5F, mask);
  CHECK(mask[0] == 0b1110000);
  keep_above<float>(weights, 0.0F, mask);
  CHECK(mask[0] == 0b1111100);
}

TEST_CASE("masks that don't fit are refused") {
  const std::vector<float> weights(9, 1.0F);
  std::vector<std::uint8_t> mask(1);
  CHECK_THROWS_AS(keep_largest<float>(weights, 1, mask), std::invalid_argument);
  mask.assign(2, 0xff);
  std::vector<float> dense(9);
  CHECK_THROWS_AS(expand<float>(mask, std::vector<float>(16), dense), std::invalid_argument);
  CHECK_THROWS_AS(expand<float>(mask, std::vector<float>(3), dense), std::invalid_argument);
}

TEST_CASE("a changed survivor and a zero among the stored are found") {
  std::vector<Half> weights = tied_weights<Half>(5000);
  std::vector<std::uint8_t> mask(625);
  keep_largest<Half>(weights, 2500, mask);
  std::vector<Half> nonzeros(count_kept(mask));
  compact<Half>(weights, mask, nonzeros);
  nonzeros[7] = to_half(0.0F);
  nonzeros[1900] = to_half(9.0F);
  const SparseFidelity judged = compare_sparse<Half>(weights, mask, nonzeros);
  CHECK(judged.fidelity.n_outside == 2);
  CHECK(judged.n_zeros == 5000 - nonzeros.size() + 1);
}

TEST_CASE("packing is a stream of bits, least significant first, and unpacking undoes it") {
  for (const int bits : {1, 2, 3, 4, 6, 8}) {
    for (std::size_t n = 0; n <= 40; ++n) {
      std::vector<std::uint8_t> codes(n);
      for (std::size_t i = 0; i < n; ++i) {
        codes[i] = static_cast<std::uint8_t>((i * 167 + 13) % (1U << bits));
      }
      std::vector<std::uint8_t> expected(packed_size(n, bits));
      for (std::size_t i = 0; i < n * static_cast<std::size_t>(bits); ++i) {
        const auto width = static_cast<std::size_t>(bits);
        expected[i / 8] = static_cast<std::uint8_t>(expected[i / 8] |
                                                    (codes[i / width] >> i % width & 1) << i % 8);
      }
      std::vector<std::uint8_t> packed(expected.size());
      pack(codes, bits, packed);
      REQUIRE(packed == expected);
      std::vector<std::uint8_t> back(n);
      unpack<std::uint8_t>(packed, bits, back);
      REQUIRE(back == codes);
      std::vector<std::int8_t> extended(n);
      unpack<std::int8_t>(packed, bits, extended);
      for (std::size_t i = 0; i < n; ++i) {
        const int sign = 1 << (bits - 1);
        REQUIRE(extended[i] == (codes[i] ^ sign) - sign);
      }
    }
  }
  std::vector<std::uint8_t> one(1);
  CHECK_THROWS_AS(pack(one, 5, one), std::invalid_argument);
  CHECK_THROWS_AS(pack(one, 8, std::span(one).first(0)), std::invalid_argument);
}

TEST_CASE("the comparison counts weights that differ in any bit, a zero's sign included") {
  std::vector<float> source = tied_weights<float>(3000);
  source[5] = 0.0F;
  std::vector<float> decoded = source;
  CHECK(compare<float>(source, decoded).n_outside == 0);
  decoded[5] = -0.0F;
  decoded[2999] += 1;
  const Fidelity judged = compare<float>(source, decoded);
  CHECK(judged.n_outside == 2);
  CHECK(judged.noise == 1);
}

TEST_CASE("the first weight that is not finite is found wherever it stands") {
  for (const std::size_t place : {0U, 1U, 4095U, 4096U, 9999U, 10000U}) {
    std::vector<Half> weights(10000, to_half(-65504.0F));
    std::vector<float> floats(10000, std::numeric_limits<float>::max());
    if (place < weights.size()) {
      weights[place] = Half{0xfc00};
      floats[place] = NAN;
      weights.back() = place == 9999 ? weights.back() : Half{0x7e00};
    }
    CHECK(first_nonfinite<Half>(weights) == place);
    CHECK(first_nonfinite<float>(floats) == place);
  }
}

}  // namespace
}  // namespace milpress
