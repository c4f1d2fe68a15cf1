#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/half.h"
#include "core/keys.h"
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

// Magnitudes in their order, NaN above infinity.
template <typename T>
std::pair<bool, float> rank(T weight) {
  const float value = std::abs(to_float(weight));
  return std::isnan(value) ? std::pair(true, 0.0F) : std::pair(false, value);
}

// Equal in every bit; -0.0 is not 0.0, and NaN equals itself.
template <typename T>
bool same(T a, T b) {
  return order_key(a) == order_key(b);
}

template <typename T>
std::vector<T> special_weights(std::size_t n) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> values{0.0F,     -0.0F, NAN,   -0.5F, 0.5F,   infinity,
                                  0x1p-24F, 1.0F,  -1.0F, 0.0F,  -65504, -0x1p-24F};
  std::mt19937 random(static_cast<unsigned>(n));
  std::vector<T> weights(n);
  for (T& weight : weights) {
    weight = from_float<T>(values[random() % values.size()]);
  }
  return weights;
}

template <typename T>
void check_selection(const std::vector<T>& weights, std::size_t n_zeros) {
  const std::size_t n = weights.size();
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return rank(weights[a]) < rank(weights[b]);
  });
  std::vector<bool> kept(n);
  for (std::size_t i = n_zeros; i < n; ++i) {
    kept[order[i]] = to_float(weights[order[i]]) != 0;
  }
  std::vector<std::uint8_t> mask((n + 7) / 8, 0xaa);
  keep_largest<T>(weights, n_zeros, mask);
  std::size_t n_wrong = 0;
  for (std::size_t i = 0; i < n; ++i) {
    n_wrong += bit(mask, i) == kept[i] ? 0U : 1U;
  }
  // As many as stay: no spare bit is set.
  REQUIRE(count_kept(mask) == static_cast<std::size_t>(std::count(kept.begin(), kept.end(), true)));
  std::vector<T> nonzeros(count_kept(mask));
  compact<T>(weights, mask, nonzeros);
  std::vector<T> dense(n);
  expand<T>(mask, nonzeros, dense);
  for (std::size_t i = 0; i < n; ++i) {
    n_wrong += same(dense[i], kept[i] ? weights[i] : T{}) ? 0U : 1U;
  }
  CHECK(n_wrong == 0);
  const SparseFidelity judged = compare_sparse<T>(weights, mask, nonzeros);
  CHECK(judged.fidelity.n_outside == 0);
  CHECK(judged.n_zeros == n - nonzeros.size());
  CHECK_FALSE(judged.greatest_pruned > judged.least_kept);
}

TEST_CASE_TEMPLATE("the smallest go, of equals the earlier first, and the rest comes back", T, Half,
                   float) {
  for (const std::size_t n : {0U, 1U, 7U, 8U, 9U, 2047U, 2048U, 2049U}) {
    for (const std::size_t n_zeros : {std::size_t{0}, std::size_t{1}, n / 3, n / 2, n - 1, n}) {
      check_selection(tied_weights<T>(n), std::min(n, n_zeros));
      check_selection(special_weights<T>(n), std::min(n, n_zeros));
    }
  }
  for (std::size_t n_zeros = 0; n_zeros <= 40; ++n_zeros) {
    check_selection(special_weights<T>(40), n_zeros);
  }
  for (const std::size_t n : {262'143U, 262'144U, 262'145U}) {
    check_selection(tied_weights<T>(n), 100'000);
  }
}

TEST_CASE("floats that differ in their lowest bits only are told apart") {
  std::vector<float> weights(3000);
  std::mt19937 random(1);
  for (float& weight : weights) {
    weight =
        value_at(static_cast<std::int32_t>(0x3f800000 + random() % 70'000));  // across both digits
    weight = random() % 2 == 0 ? weight : -weight;
  }
  for (const std::size_t n_zeros : {1U, 1500U, 2999U}) {
    check_selection(weights, n_zeros);
  }
}

TEST_CASE_TEMPLATE("what is compacted comes back by expanding, at any density", T, Half, float) {
  for (const std::size_t n : {0U, 1U, 9U, 2049U, 262'143U, 262'144U, 262'145U, 600'000U}) {
    for (const double density : {0.0, 0.01, 0.5, 1.0}) {
      const std::vector<T> weights = special_weights<T>(n);
      std::mt19937 random(7);
      std::vector<std::uint8_t> mask((n + 7) / 8);
      std::vector<T> kept;
      std::vector<T> expected(n);
      for (std::size_t i = 0; i < n; ++i) {
        if (static_cast<double>(random()) < density * 0x1p32) {
          mask[i / 8] = static_cast<std::uint8_t>(mask[i / 8] | 1U << i % 8);
          kept.push_back(weights[i]);
          expected[i] = weights[i];
        }
      }
      REQUIRE(count_kept(mask) == kept.size());
      std::vector<T> nonzeros(kept.size());
      compact<T>(weights, mask, nonzeros);
      CHECK(std::equal(nonzeros.begin(), nonzeros.end(), kept.begin(), same<T>));
      std::vector<T> dense(n, from_float<T>(3.0F));
      expand<T>(mask, nonzeros, dense);
      CHECK(std::equal(dense.begin(), dense.end(), expected.begin(), same<T>));
    }
  }
}

TEST_CASE("a threshold keeps what is above it and no zero of either sign") {
  const std::vector<float> weights{-0.0F, 0.0F, 0.5F, -0.5F, 0.51F, -2.0F, NAN};
  std::vector<std::uint8_t> mask(1);
  keep_above<float>(weights, 0.5F, mask);
  CHECK(mask[0] == 0b1110000);
  keep_above<float>(weights, 0.0F, mask);
  CHECK(mask[0] == 0b1111100);
  keep_above<float>(weights, -0.0F, mask);
  CHECK(mask[0] == 0b1111100);
}

TEST_CASE_TEMPLATE("a threshold splits every length where the magnitudes say", T, Half, float) {
  for (const std::size_t n : {0U, 1U, 7U, 8U, 9U, 2049U, 262'145U}) {
    const std::vector<T> weights = special_weights<T>(n);
    for (const float threshold : {0.0F, 0x1p-24F, 0.5F, 65504.0F, INFINITY}) {
      std::vector<std::uint8_t> mask((n + 7) / 8, 0xaa);
      keep_above<T>(weights, from_float<T>(threshold), mask);
      std::size_t n_wrong = n % 8 != 0 && mask.back() >> n % 8 != 0 ? 1 : 0;
      for (std::size_t i = 0; i < n; ++i) {
        n_wrong += bit(mask, i) == (rank(weights[i]) > std::pair(false, threshold)) ? 0U : 1U;
      }
      CHECK(n_wrong == 0);
    }
  }
}

TEST_CASE("masks that don't fit are refused") {
  const std::vector<float> weights(9, 1.0F);
  std::vector<std::uint8_t> mask(1);
  CHECK_THROWS_AS(keep_largest<float>(weights, 1, mask), std::invalid_argument);
  mask.assign(2, 0xff);
  std::vector<float> dense(9);
  CHECK_THROWS_AS(expand<float>(mask, std::vector<float>(16), dense), std::invalid_argument);
  CHECK_THROWS_AS(expand<float>(mask, std::vector<float>(3), dense), std::invalid_argument);
  CHECK_THROWS_AS(compact<float>(weights, mask, dense), std::invalid_argument);
  mask[1] = 1;
  CHECK_NOTHROW(expand<float>(mask, std::vector<float>(9), dense));
  for (unsigned spare = 1; spare < 8; ++spare) {
    mask[1] = static_cast<std::uint8_t>(1U << spare);
    CHECK_THROWS_AS(expand<float>(mask, std::vector<float>(9), dense), std::invalid_argument);
  }
  mask[1] = 0;
  CHECK_THROWS_AS(expand<float>(mask, std::vector<float>(9), dense), std::invalid_argument);
  CHECK_THROWS_AS(expand<float>(mask, std::vector<float>(7), dense), std::invalid_argument);
  mask.resize(3);
  CHECK_THROWS_AS(expand<float>(mask, std::vector<float>(8), dense), std::invalid_argument);
  CHECK_THROWS_AS(keep_largest<float>(weights, 1, mask), std::invalid_argument);
  mask.resize(2);
  CHECK_THROWS_AS(keep_largest<float>(weights, 10, mask), std::invalid_argument);
  CHECK_THROWS_AS(keep_above<float>(weights, -0.5F, mask), std::invalid_argument);
  CHECK_THROWS_AS(keep_above<float>(weights, NAN, mask), std::invalid_argument);
}

template <typename T>
void check_n_m(const std::vector<T>& weights, ChannelShape shape, std::size_t n, std::size_t m) {
  CAPTURE(shape.n_channels);
  CAPTURE(shape.n_inner);
  CAPTURE(n);
  CAPTURE(m);
  std::vector<std::uint8_t> mask((weights.size() + 7) / 8, 0xaa);
  keep_n_m<T>(weights, shape, n, m, mask);
  std::size_t n_wrong = 0;
  std::size_t n_kept = 0;
  for (std::size_t outer = 0; outer < shape.n_outer; ++outer) {
    for (std::size_t inner = 0; inner < shape.n_inner; ++inner) {
      for (std::size_t first = 0; first < shape.n_channels; first += m) {
        using Item = std::pair<std::pair<bool, float>, std::size_t>;
        std::vector<Item> run;
        for (std::size_t channel = first; channel < first + m; ++channel) {
          const std::size_t place = (outer * shape.n_channels + channel) * shape.n_inner + inner;
          run.emplace_back(channel < shape.n_channels ? rank(weights[place]) : rank(T{}), place);
        }
        std::stable_sort(run.begin(), run.end(),
                         [](const Item& a, const Item& b) { return a.first < b.first; });
        for (std::size_t j = 0; j < m; ++j) {
          // A weight that fills a run up is zero, so it never stays.
          const bool stays = j >= n && run[j].first != std::pair(false, 0.0F);
          const bool is_real = run[j].second < (outer + 1) * shape.n_channels * shape.n_inner;
          n_kept += stays ? 1U : 0U;
          n_wrong += is_real && bit(mask, run[j].second) != stays ? 1U : 0U;
        }
      }
    }
  }
  CHECK(n_wrong == 0);
  CHECK(count_kept(mask) == n_kept);  // no spare bit is set
}

TEST_CASE_TEMPLATE("the smallest of every few channels go, the earlier of equals first", T, Half,
                   float) {
  for (const std::size_t n_channels : {1U, 3U, 4U, 5U, 64U, 66U, 257U}) {
    for (const std::size_t n_inner : {1U, 2U, 9U, 63U, 64U, 65U, 150U}) {
      const ChannelShape shape{3, n_channels, n_inner};
      const std::size_t size = 3 * n_channels * n_inner;
      for (const std::size_t m : {1U, 2U, 4U, 7U, 32U, 33U, 300U}) {
        for (const std::size_t n : {std::size_t{0}, std::size_t{1}, m / 2, m - 1, m}) {
          check_n_m(tied_weights<T>(size), shape, n, m);
          check_n_m(special_weights<T>(size), shape, n, m);
        }
      }
    }
  }
  check_n_m(tied_weights<T>(600'000), {1, 600'000, 1}, 2, 4);
  check_n_m(tied_weights<T>(600'000), {100'000, 6, 1}, 2, 4);
  check_n_m(tied_weights<T>(2 * 300'000), {1, 2, 300'000}, 1, 2);
}

template <typename T>
void check_blocks(const std::vector<T>& weights, ChannelShape shape, std::size_t block_size,
                  std::size_t n_zeros) {
  CAPTURE(shape.n_channels);
  CAPTURE(shape.n_inner);
  CAPTURE(block_size);
  CAPTURE(n_zeros);
  struct Column {
    std::pair<bool, double> norm;
    std::vector<std::size_t> places;
  };
  std::vector<Column> blocks;
  for (std::size_t outer = 0; outer < shape.n_outer; ++outer) {
    for (std::size_t first = 0; first < shape.n_channels; first += block_size) {
      for (std::size_t inner = 0; inner < shape.n_inner; ++inner) {
        Column block;
        double sum = 0;
        for (std::size_t j = first; j < std::min(first + block_size, shape.n_channels); ++j) {
          block.places.push_back((outer * shape.n_channels + j) * shape.n_inner + inner);
          const double weight = to_float(weights[block.places.back()]);
          sum += weight * weight;
        }
        block.norm = std::isnan(sum) ? std::pair(true, 0.0) : std::pair(false, sum);
        blocks.push_back(block);
      }
    }
  }
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const Column& a, const Column& b) { return a.norm < b.norm; });
  std::vector<bool> kept(weights.size());
  for (std::size_t i = 0; i < weights.size(); ++i) {
    kept[i] = to_float(weights[i]) != 0;
  }
  std::size_t n_left = n_zeros;
  for (const Column& block : blocks) {
    if (block.places.size() > n_left) {
      break;
    }
    n_left -= block.places.size();
    for (const std::size_t place : block.places) {
      kept[place] = false;
    }
  }
  std::vector<std::uint8_t> mask((weights.size() + 7) / 8, 0xaa);
  keep_blocks<T>(weights, shape, block_size, n_zeros, mask);
  std::size_t n_wrong = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    n_wrong += bit(mask, i) == kept[i] ? 0U : 1U;
  }
  CHECK(n_wrong == 0);
  CHECK(count_kept(mask) == static_cast<std::size_t>(std::count(kept.begin(), kept.end(), true)));
}

TEST_CASE_TEMPLATE("blocks go by their norm as long as the zeros are not too many", T, Half,
                   float) {
  for (const std::size_t n_channels : {1U, 4U, 5U, 31U}) {
    for (const std::size_t n_inner : {1U, 3U, 17U}) {
      const std::size_t size = 2 * n_channels * n_inner;
      for (const std::size_t block_size : {1U, 2U, 3U, 4U, 40U}) {
        for (const std::size_t n_zeros : {std::size_t{0}, size / 3, size / 2, size - 1, size}) {
          check_blocks(tied_weights<T>(size), {2, n_channels, n_inner}, block_size, n_zeros);
          check_blocks(special_weights<T>(size), {2, n_channels, n_inner}, block_size, n_zeros);
        }
      }
    }
  }
  check_blocks(tied_weights<T>(600'001), {1, 600'001, 1}, 4, 300'000);
  check_blocks(tied_weights<T>(600'000), {1, 2, 300'000}, 2, 300'000);
}

TEST_CASE("blocks with a NaN go in their order, whatever payloads they have") {
  const std::vector<Half> weights{Half{0x7fff}, Half{0x3c00}, Half{0xfe01}, Half{0x7e00}};
  std::vector<std::uint8_t> mask(1);
  keep_blocks<Half>(weights, {1, 4, 1}, 1, 2, mask);
  CHECK(mask[0] == 0b1100);
  keep_blocks<Half>(weights, {1, 4, 1}, 1, 3, mask);
  CHECK(mask[0] == 0b1000);
}

TEST_CASE("norms are told apart far beyond the range of a float, and a NaN's sign doesn't matter") {
  std::vector<float> weights{2e-40F, 1e-40F, 3e38F, 2e38F, -NAN, NAN};
  std::vector<std::uint8_t> mask(1);
  keep_blocks<float>(weights, {1, 6, 1}, 1, 3, mask);
  CHECK(mask[0] == 0b110100);
  keep_blocks<float>(weights, {1, 6, 1}, 1, 5, mask);
  CHECK(mask[0] == 0b100000);
}

TEST_CASE("channels that don't fit are refused, and none at all is an empty mask") {
  const std::vector<Half> weights(24, to_half(1.0F));
  std::vector<std::uint8_t> mask(3);
  const auto n_m = [&](ChannelShape shape, std::size_t n, std::size_t m) {
    keep_n_m<Half>(weights, shape, n, m, mask);
  };
  const auto blocks = [&](ChannelShape shape, std::size_t block_size, std::size_t n_zeros) {
    keep_blocks<Half>(weights, shape, block_size, n_zeros, mask);
  };
  CHECK_NOTHROW(n_m({2, 4, 3}, 2, 4));
  CHECK_NOTHROW(blocks({2, 4, 3}, 2, 24));
  constexpr std::size_t kHalf = std::size_t{1} << 63;
  for (const ChannelShape shape :
       {ChannelShape{2, 4, 4}, ChannelShape{0, 4, 3}, ChannelShape{5, 4, 3}, ChannelShape{24, 0, 1},
        ChannelShape{kHalf, 2, 24}}) {
    CHECK_THROWS_AS(n_m(shape, 1, 2), std::invalid_argument);
    CHECK_THROWS_AS(blocks(shape, 1, 2), std::invalid_argument);
  }
  CHECK_THROWS_AS(n_m({2, 4, 3}, 1, 0), std::invalid_argument);
  CHECK_THROWS_AS(n_m({2, 4, 3}, 0, 0), std::invalid_argument);
  CHECK_THROWS_AS(n_m({2, 4, 3}, 5, 4), std::invalid_argument);
  CHECK_THROWS_AS(blocks({2, 4, 3}, 0, 4), std::invalid_argument);
  CHECK_THROWS_AS(blocks({2, 4, 3}, 1, 25), std::invalid_argument);
  mask.resize(2);
  CHECK_THROWS_AS(n_m({2, 4, 3}, 2, 4), std::invalid_argument);
  CHECK_THROWS_AS(blocks({2, 4, 3}, 2, 4), std::invalid_argument);
  CHECK_NOTHROW(keep_n_m<Half>({}, {3, 0, 2}, 1, 2, {}));
  CHECK_NOTHROW(keep_blocks<Half>({}, {3, 2, 0}, 1, 0, {}));
  CHECK_THROWS_AS(keep_blocks<Half>({}, {3, 2, 1}, 1, 0, {}), std::invalid_argument);
}

TEST_CASE_TEMPLATE("a pruned weight's extremes and counts are those of a plain loop", T, Half,
                   float) {
  for (const std::size_t n : {0U, 1U, 9U, 1025U, 131'073U, 300'001U}) {
    std::mt19937 random(static_cast<unsigned>(n));
    const std::vector<T> weights = tied_weights<T>(n);
    std::vector<std::uint8_t> mask((n + 7) / 8);
    std::vector<T> nonzeros;
    SparseFidelity expected;
    expected.least_kept = std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < n; ++i) {
      const float weight = to_float(weights[i]);
      expected.fidelity.signal += double{weight} * weight;
      if (random() % 4 == 0) {  // some are dropped that are greater than some that stay
        expected.fidelity.noise += double{weight} * weight;
        expected.greatest_pruned = std::max(expected.greatest_pruned, std::abs(weight));
        ++expected.n_zeros;
      } else {
        const bool changed = random() % 100 == 0;
        mask[i / 8] = static_cast<std::uint8_t>(mask[i / 8] | 1U << i % 8);
        nonzeros.push_back(from_float<T>(changed ? weight + 0.25F : weight));
        expected.fidelity.n_outside += changed ? 1U : 0U;
        expected.fidelity.noise += changed ? 0.0625 : 0;
        expected.n_zeros += to_float(nonzeros.back()) == 0 ? 1U : 0U;
        expected.least_kept = std::min(expected.least_kept, std::abs(weight));
      }
    }
    const SparseFidelity judged = compare_sparse<T>(weights, mask, nonzeros);
    CHECK(judged.fidelity.n_outside == expected.fidelity.n_outside);
    CHECK(judged.n_zeros == expected.n_zeros);
    CHECK(judged.greatest_pruned == expected.greatest_pruned);
    CHECK(judged.least_kept == expected.least_kept);
    // Squares of eighths add up exactly in a float's 24 bits.
    CHECK(judged.fidelity.signal == expected.fidelity.signal);
    CHECK(judged.fidelity.noise == expected.fidelity.noise);
  }
}

TEST_CASE_TEMPLATE("a palette's codes are outside where another entry is nearer, ties are not", T,
                   Half, float) {
  const std::size_t n_rows = 3;
  const std::size_t k = 5;
  const std::vector<float> tables{-2, -1, 0, 1, 2, -0.5, -0.5, 0, 0.25, 1, -1, 1, 1, 1, 2};
  std::vector<T> luts;
  std::transform(tables.begin(), tables.end(), std::back_inserter(luts), from_float<T>);
  for (const std::size_t n_cols : {1U, 33U, 1025U, 70'000U}) {
    const std::vector<T> weights = tied_weights<T>(n_rows * n_cols);
    std::vector<std::uint8_t> codes(weights.size());
    std::mt19937 random(static_cast<unsigned>(n_cols));
    Fidelity expected;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const float* const lut = tables.data() + i / n_cols * k;
      const double weight = to_float(weights[i]);
      double least = std::abs(weight - lut[0]);
      for (std::size_t j = 1; j < k; ++j) {
        least = std::min(least, std::abs(weight - lut[j]));
      }
      // Mostly the last of the nearest, the upper one of a tie; sometimes any code.
      codes[i] = static_cast<std::uint8_t>(random() % k);
      for (std::size_t j = 0; j < k && i % 10 != 0; ++j) {
        codes[i] = std::abs(weight - lut[j]) == least ? static_cast<std::uint8_t>(j) : codes[i];
      }
      const double error = std::abs(weight - lut[codes[i]]);
      expected.n_outside += error > least ? 1U : 0U;
      expected.signal += weight * weight;
      expected.noise += error * error;
    }
    const auto judge = [&](std::size_t n_luts) {
      return compare_palette<T>({weights.data(), n_rows, n_cols}, {codes.data(), n_rows, n_cols},
                                {luts.data(), n_luts, k});
    };
    const Fidelity judged = judge(n_rows);
    CHECK(judged.n_outside == expected.n_outside);
    CHECK(judged.signal == expected.signal);  // exact, as above
    CHECK(judged.noise == expected.noise);
    CHECK_THROWS_AS(judge(2), std::invalid_argument);
    codes.back() = k;
    CHECK_THROWS_AS(judge(n_rows), std::invalid_argument);
  }
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
  std::vector<std::int8_t> two(2);
  for (const int bits : {-1, 0, 5, 7, 9}) {
    CHECK_THROWS_AS(unpack<std::int8_t>(one, bits, two), std::invalid_argument);
  }
  CHECK_THROWS_AS(unpack<std::int8_t>(one, 8, two), std::invalid_argument);
  CHECK_THROWS_AS(pack(one, 5, one), std::invalid_argument);
  CHECK_THROWS_AS(pack(one, 8, std::span(one).first(0)), std::invalid_argument);
}

TEST_CASE("more codes than a thread takes at a time pack like few, high bits dropped") {
  const std::size_t n = 524'288 + 13;
  std::vector<std::uint8_t> codes(n);
  for (std::size_t i = 0; i < n; ++i) {
    codes[i] = static_cast<std::uint8_t>(i * 167 / 3);
  }
  for (const int bits : {1, 3, 6}) {
    const auto width = static_cast<std::size_t>(bits);
    std::vector<std::uint8_t> packed(packed_size(n, bits), 0xff);
    pack(codes, bits, packed);
    std::size_t n_wrong = 0;
    for (std::size_t i = 0; i < packed.size() * 8; ++i) {
      const bool expected = i < n * width && (codes[i / width] >> i % width & 1) != 0;
      n_wrong += bit(packed, i) == expected ? 0U : 1U;
    }
    CHECK(n_wrong == 0);
    std::vector<std::uint8_t> back(n);
    unpack<std::uint8_t>(packed, bits, back);
    for (std::size_t i = 0; i < n; ++i) {
      n_wrong += back[i] == (codes[i] & ((1U << bits) - 1)) ? 0U : 1U;
    }
    CHECK(n_wrong == 0);
  }
}

TEST_CASE_TEMPLATE("sums of squares are those of a plain loop at every length", T, Half, float) {
  for (const std::size_t n : {0U, 1U, 7U, 8U, 9U, 1023U, 1024U, 1025U, 131'073U, 300'001U}) {
    const std::vector<T> source = tied_weights<T>(n);
    std::vector<T> decoded = source;
    Fidelity expected;
    for (std::size_t i = 0; i < n; ++i) {
      const double weight = to_float(source[i]);
      if (i % 7 == 3) {
        decoded[i] = from_float<T>(static_cast<float>(weight) - 0.5F);
        expected.noise += 0.25;
        ++expected.n_outside;
      }
      expected.signal += weight * weight;
    }
    const Fidelity judged = compare<T>(source, decoded);
    CHECK(judged.signal == expected.signal);  // exact, as above
    CHECK(judged.noise == expected.noise);
    CHECK(judged.n_outside == expected.n_outside);
  }
}

TEST_CASE("weights that are not finite make the sums not finite, and sizes must agree") {
  std::vector<float> source(20, 1.0F);
  const std::vector<float> decoded(20, 1.0F);
  source[19] = NAN;
  CHECK(std::isnan(compare<float>(source, decoded).noise));
  source[19] = INFINITY;
  CHECK(std::isinf(compare<float>(source, decoded).signal));
  CHECK_THROWS_AS(compare<float>(source, std::span(decoded).first(19)), std::invalid_argument);
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

TEST_CASE("one infinite or undefined weight is found at each place of a ragged row") {
  std::vector<Half> weights(70, Half{0x7bff});
  CHECK(first_nonfinite<Half>(std::span(weights).first(0)) == 0);
  for (const std::uint16_t bad : {0x7c00, 0xfc00, 0x7c01, 0xffff}) {
    for (std::size_t place = 0; place < weights.size(); ++place) {
      weights[place] = Half{bad};
      CHECK(first_nonfinite<Half>(weights) == place);
      weights[place] = Half{0xfbff};
    }
  }
}

}  // namespace
}  // namespace milpress
