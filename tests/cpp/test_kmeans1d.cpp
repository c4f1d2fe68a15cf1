#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/half.h"
#include "core/parallel.h"
#include "kernels/cluster_cost.h"
#include "kernels/clusters1d.h"
#include "kernels/kmeans1d.h"
#include "kernels/value_buckets.h"
#include "kernels/value_counts.h"

namespace milpress {
namespace {

std::vector<std::size_t> optimal_clusters(const WeightedValues& data, std::size_t k) {
  return ClusterSearch().best(data, k);
}

constexpr double kTolerance = 1e-6;  // what the kernel promises for the squared error

const std::vector<std::string> kShapes = {"bell",     "uniform", "grid",        "few values",
                                          "clusters", "equal",   "heavy tails", "ties"};

template <typename T>
std::vector<T> random_weights(std::mt19937& random, std::size_t n, const std::string& shape) {
  std::normal_distribution<float> bell;
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::cauchy_distribution<float> cauchy(0, 0.1F);
  const float far = std::is_same_v<T, Half> ? 4 : 1;
  std::vector<T> weights(n);
  for (T& weight : weights) {
    float value = 0.5F;
    if (shape == "bell") {
      value = 0.05F * bell(random);
    } else if (shape == "uniform") {
      value = uniform(random);
    } else if (shape == "grid") {
      value = static_cast<float>(static_cast<int>(random() % 64) - 32);
    } else if (shape == "few values") {
      value = std::sin(static_cast<float>(random() % 9));
    } else if (shape == "clusters") {
      const float centre = far * (static_cast<float>(random() % 4) - 1.5F);
      value = centre * (1 + (std::is_same_v<T, Half> ? 0x1p-8F : 1e-6F) * uniform(random));
    } else if (shape == "heavy tails") {
      const float base = cauchy(random);
      value = std::clamp(base * base * base, -6e4F, 6e4F);
    } else if (shape == "ties") {
      value = static_cast<float>(random() % 24) / 8 + 100;
    }
    weight = from_float<T>(value);
  }
  return weights;
}

std::vector<float> random_importance(std::mt19937& random, std::size_t n) {
  std::normal_distribution<float> bell;
  std::vector<float> importance(n);
  for (float& share : importance) {
    share = random() % 8 == 0 ? 0.0F : std::exp(3 * bell(random));
  }
  return importance;
}

template <typename T>
WeightedValues distinct(const std::vector<T>& weights, const std::vector<float>& importance) {
  std::map<float, double> totals;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    totals[to_float(weights[i]) + 0.0F] += importance.empty() ? 1.0F : importance[i];
  }
  WeightedValues data;
  for (const auto& [value, total] : totals) {
    if (total > 0) {
      data.values.push_back(value);
      data.weights.push_back(total);
    }
  }
  return data;
}

// The least squared error by the plain dynamic program, O(k n^2). A cluster grows by one value at a
// time, which adds a positive term (West 1979), and its mean is
// counted from the heavier side: nothing cancels.
double least_error(const WeightedValues& data, std::size_t k) {
  constexpr long double kInfinity = std::numeric_limits<long double>::infinity();
  const std::size_t n = data.values.size();
  std::vector<long double> best(n + 1, kInfinity);
  best[0] = 0;
  for (std::size_t layer = 0; layer < std::min(k, n); ++layer) {
    std::vector<long double> next(n + 1, kInfinity);
    for (std::size_t i = 1; i <= n; ++i) {
      long double weight = 0;
      long double mean = 0;
      long double error = 0;
      for (std::size_t j = i; j-- > 0;) {
        const long double gap = data.values[j] - mean;
        const long double added = data.weights[j];
        const long double total = weight + added;
        error += weight * (added / total) * gap * gap;
        mean =
            added < weight ? mean + gap * (added / total) : data.values[j] - gap * (weight / total);
        weight = total;
        next[i] = std::min(next[i], best[j] + error);
      }
    }
    best = std::move(next);
  }
  return static_cast<double>(best[n]);
}

double error_of(const WeightedValues& data, const std::vector<float>& lut) {
  double error = 0;
  for (std::size_t i = 0; i < data.values.size(); ++i) {
    double least = std::numeric_limits<double>::infinity();
    for (const float entry : lut) {
      least = std::min(least, std::abs(data.values[i] - entry));
    }
    error += data.weights[i] * least * least;
  }
  return error;
}

template <typename T>
std::vector<float> fitted(const std::vector<T>& weights, const std::vector<float>& importance,
                          std::size_t k) {
  std::vector<T> lut(k);
  kmeans1d<T>({weights.data(), 1, weights.size()},
              {importance.data(), importance.empty() ? 0U : 1U, importance.size()},
              {lut.data(), 1, k});
  std::vector<float> result;
  std::transform(lut.begin(), lut.end(), std::back_inserter(result),
                 [](T entry) { return to_float(entry); });
  return result;
}

// Rounding a mean by d adds weight * d^2; d is at most half a unit in the last place.
template <typename T>
double rounding_error(const WeightedValues& data) {
  double error = 0;
  for (std::size_t i = 0; i < data.values.size(); ++i) {
    const double largest = std::max(std::abs(data.values.front()), std::abs(data.values.back()));
    const double step =
        std::is_same_v<T, Half> ? std::max(0x1p-11 * largest, 0x1p-25) : 0x1p-24 * largest;
    error += data.weights[i] * step * step;
  }
  return error;
}

bool are_ends(const std::vector<std::size_t>& ends, std::size_t n, std::size_t k) {
  return ends.size() == std::min(n, k) &&
         (ends.empty() || (ends.front() > 0 && ends.back() == n)) &&
         std::adjacent_find(ends.begin(), ends.end(), std::greater_equal<>()) == ends.end();
}

template <typename T>
void check_optimal(const std::vector<T>& weights, const std::vector<float>& importance,
                   std::size_t k) {
  const WeightedValues data = distinct(weights, importance);
  const double optimum = least_error(data, k);
  for (const auto solve : {optimal_clusters, optimal_clusters_by_dynamic_program}) {
    const std::vector<std::size_t> ends = solve(data, k);
    REQUIRE(are_ends(ends, data.values.size(), k));
    REQUIRE(squared_error(data, ends) <= (1 + kTolerance) * optimum);
    REQUIRE(squared_error(data, ends) >= (1 - kTolerance) * optimum);
  }
  const std::vector<float> lut = fitted(weights, importance, k);
  REQUIRE(std::is_sorted(lut.begin(), lut.end()));
  if (!data.values.empty()) {
    REQUIRE(error_of(data, lut) <= (1 + kTolerance) * optimum + rounding_error<T>(data));
  }
}

// MILPRESS_TEST_CASES asks for more than the suite has time for.
int n_random_cases() {
  const char* text = std::getenv("MILPRESS_TEST_CASES");
  return text == nullptr ? 1500 : std::atoi(text);
}

TEST_CASE_TEMPLATE("clusters are optimal in every shape of data", T, Half, float) {
  std::mt19937 random(1);
  for (int i = 0; i < n_random_cases(); ++i) {
    const std::string& shape = kShapes[random() % kShapes.size()];
    const std::size_t n = 1 + random() % 50;
    const std::size_t k = 1 + random() % (random() % 4 == 0 ? 60 : 12);
    const std::vector<T> weights = random_weights<T>(random, n, shape);
    const std::vector<float> importance =
        random() % 2 == 0 ? std::vector<float>() : random_importance(random, n);
    CAPTURE(shape);
    CAPTURE(n);
    CAPTURE(k);
    CAPTURE(i);
    check_optimal(weights, importance, k);
  }
}

TEST_CASE_TEMPLATE("clusters are optimal where the search starts on coarse data", T, Half, float) {
  std::mt19937 random(2);
  for (int i = 0; i < n_random_cases() / 20; ++i) {
    const std::string& shape = kShapes[random() % kShapes.size()];
    const std::size_t n = 200 + random() % 200;
    const std::vector<T> weights = random_weights<T>(random, n, shape);
    const std::vector<float> importance =
        random() % 2 == 0 ? std::vector<float>() : random_importance(random, n);
    CAPTURE(shape);
    CAPTURE(i);
    check_optimal(weights, importance, 3 + random() % 3);
  }
}

TEST_CASE_TEMPLATE("the search finds what the dynamic program finds in long rows", T, Half, float) {
  std::mt19937 random(3);
  for (const std::string& shape : kShapes) {
    for (const std::size_t k : {2, 4, 16, 64}) {
      const std::vector<T> weights = random_weights<T>(random, 5000, shape);
      for (const bool weighted : {false, true}) {
        const WeightedValues data = distinct(
            weights, weighted ? random_importance(random, weights.size()) : std::vector<float>());
        const double error = squared_error(data, optimal_clusters(data, k));
        const double oracle = squared_error(data, optimal_clusters_by_dynamic_program(data, k));
        CAPTURE(shape);
        CAPTURE(k);
        CHECK(error <= (1 + kTolerance) * oracle);
        CHECK(oracle <= (1 + kTolerance) * error);
      }
    }
  }
}

double total(const std::vector<double>& terms) {
  return std::accumulate(terms.begin(), terms.end(), 0.0);
}

TEST_CASE("buckets hold the values of a row, one by one or in clumps") {
  std::mt19937 random(10);
  for (const std::string& shape : kShapes) {
    const std::vector<float> weights = random_weights<float>(random, 3000, shape);
    for (const bool weighted : {false, true}) {
      const std::vector<float> importance =
          weighted ? random_importance(random, weights.size()) : std::vector<float>();
      const WeightedValues all = distinct(weights, importance);
      const ValueBuckets buckets(weights, importance, 256);
      const WeightedValues& clumps = buckets.clumps();
      const std::size_t n = clumps.values.size();
      CAPTURE(shape);
      CAPTURE(weighted);
      CHECK(n <= 256);
      CHECK(std::is_sorted(clumps.values.begin(), clumps.values.end()));

      const WeightedValues single = buckets.opened(std::vector<bool>(n, true));
      CHECK(single.values == all.values);
      CHECK(total(single.spreads) == 0);
      const double tiny = 1e-12;
      for (std::size_t i = 0; i < all.values.size(); ++i) {
        CHECK(single.weights[i] == doctest::Approx(all.weights[i]).epsilon(tiny));
      }

      const double error = squared_error(all, std::vector<std::size_t>{all.values.size()});
      std::vector<bool> is_open(n);
      CHECK(buckets.opened(is_open).values.size() == 1);
      for (int i = 0; i < 4; ++i) {
        const WeightedValues mixed = buckets.opened(is_open);
        const std::size_t n_mixed = mixed.values.size();
        const double mean = mean_of(all, 0, all.values.size());
        CHECK(std::is_sorted(mixed.values.begin(), mixed.values.end()));
        CHECK(total(mixed.weights) == doctest::Approx(total(all.weights)).epsilon(tiny));
        CHECK(mean_of(mixed, 0, n_mixed) == doctest::Approx(mean).epsilon(1e-9));
        CHECK(TreeCost(mixed)(0, n_mixed) == doctest::Approx(error).epsilon(1e-9));
        for (std::size_t j = 0; j < n; ++j) {
          is_open[j] = random() % 2 == 0;
        }
      }
    }
  }
}

// Whether every border of the best clusters of single values lies beside or in an open clump.
bool covers(const std::vector<bool>& is_open, const WeightedValues& clumps,
            const WeightedValues& all, const std::vector<std::size_t>& ends) {
  std::vector<double> weight_to(all.values.size() + 1);
  std::partial_sum(all.weights.begin(), all.weights.end(), weight_to.begin() + 1);
  return std::all_of(ends.begin(), ends.end() - 1, [&](std::size_t end) {
    double before = 0;
    std::size_t i = 0;
    for (; before + clumps.weights[i] < weight_to[end] - 0.5; ++i) {
      before += clumps.weights[i];
    }
    return is_open[i];
  });
}

TEST_CASE("the outline leaves no border of the best clusters out, and most clumps closed") {
  std::mt19937 random(11);
  for (const std::string shape : {"bell", "uniform", "clusters", "heavy tails"}) {
    for (const std::size_t k : {2, 3, 8, 16}) {
      for (const std::size_t n_buckets : {64U, 512U, 4096U}) {
        const std::vector<float> weights = random_weights<float>(random, 20'000, shape);
        const WeightedValues all = distinct(weights, {});
        const ValueBuckets buckets(weights, {}, n_buckets);
        const Outline outline = ClusterSearch().outline(buckets.clumps(), k, buckets.range());
        CAPTURE(shape);
        CAPTURE(k);
        CAPTURE(n_buckets);
        const std::vector<std::size_t> ends = optimal_clusters_by_dynamic_program(all, k);
        CHECK(covers(outline.may_be_cut, buckets.clumps(), all, ends));
        if (n_buckets == 4096 && shape != "heavy tails") {
          const auto n_open =
              std::count(outline.may_be_cut.begin(), outline.may_be_cut.end(), true);
          CHECK(n_open < 4096 / 8);
        }
      }
    }
  }
}

TEST_CASE("a long row of floats gets the table that sorting all of it gives") {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  std::mt19937 random(12);
  for (const std::string& shape : kShapes) {
    for (const std::size_t n : {3000U, 40'000U}) {
      for (const std::size_t k : {2, 4, 11, 16}) {
        const std::vector<float> weights = random_weights<float>(random, n, shape);
        for (const bool weighted : {false, true}) {
          std::vector<float> importance =
              weighted ? random_importance(random, n) : std::vector<float>();
          const std::vector<float> lut = fitted(weights, importance, k);
          std::vector<float> with_nan = weights;  // which has no buckets
          with_nan.push_back(kNaN);
          importance.resize(weighted ? n + 1 : 0);
          CAPTURE(shape);
          CAPTURE(n);
          CAPTURE(k);
          CAPTURE(weighted);
          CHECK(fitted(with_nan, importance, k) == lut);
        }
      }
    }
  }
}

TEST_CASE("a row of several pieces gets the same table on any thread count") {
  std::mt19937 random(13);
  const std::vector<float> weights = random_weights<float>(random, 2'500'000, "bell");
  const std::size_t before = set_thread_limit(1);
  const std::vector<float> alone = fitted(weights, {}, 16);
  set_thread_limit(4);
  CHECK(fitted(weights, {}, 16) == alone);
  set_thread_limit(before);
}

TEST_CASE("the fast cost is within its bound of the accurate one, and the bound is small") {
  std::mt19937 random(14);
  for (const std::string& shape : kShapes) {
    for (const bool weighted : {false, true}) {
      const std::vector<float> weights = random_weights<float>(random, 20'000, shape);
      const WeightedValues data = distinct(
          weights, weighted ? random_importance(random, weights.size()) : std::vector<float>());
      const std::size_t n = data.values.size();
      const PrefixCost fast(data);
      const TreeCost accurate(data);
      const PrefixCost mirror = fast.mirrored();
      std::vector<std::size_t> ends = {n};
      for (std::size_t j = 1; j < std::min<std::size_t>(n, 60); ++j) {
        ends.push_back(j * n / 60);
      }
      std::sort(ends.begin(), ends.end());
      ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
      ends.erase(std::remove(ends.begin(), ends.end(), 0U), ends.end());
      double difference = 0;
      std::size_t begin = 0;
      for (const std::size_t end : ends) {
        difference += std::abs(fast(begin, end) - accurate(begin, end));
        CHECK(mirror(n - end, n - begin) == fast(begin, end));
        CHECK(accurate.mirrored()(n - end, n - begin) ==
              doctest::Approx(accurate(begin, end)).epsilon(1e-9));
        begin = end;
      }
      CAPTURE(shape);
      CAPTURE(weighted);
      CHECK(difference <= fast.error_bound(ends));
    }
  }
  // Outliers take up most of the range and a few of many clusters.
  std::vector<float> weights = random_weights<float>(random, 20'000, "bell");
  for (std::size_t i = 0; i < 200; ++i) {
    weights[i * 100] *= 100;
  }
  const WeightedValues data = distinct(weights, {});
  const std::vector<std::size_t> ends = optimal_clusters(data, 256);
  CHECK(PrefixCost(data).error_bound(ends) < 1e-7 * squared_error(data, ends));
}

std::vector<float> random_powers(std::mt19937& random, std::size_t n, float low, float high) {
  std::uniform_real_distribution<float> exponent(low, high);
  std::vector<float> powers(n);
  std::generate(powers.begin(), powers.end(), [&] { return std::exp2(exponent(random)); });
  return powers;
}

TEST_CASE("clusters are optimal where values and importance span many orders of magnitude") {
  std::mt19937 random(4);
  for (int i = 0; i < n_random_cases() / 5; ++i) {
    std::vector<float> weights = random_powers(random, 40, -40, 40);
    for (float& weight : weights) {
      weight *= random() % 2 == 0 ? 1.0F : -1.0F;
    }
    const std::vector<float> importance = random_powers(random, 40, -20, 20);
    const std::size_t k = 1 + random() % 20;
    CAPTURE(i);
    check_optimal(weights, {}, k);
    check_optimal(weights, importance, k);
    check_optimal(random_weights<float>(random, 40, "bell"), importance, k);
  }
}

TEST_CASE("entries are finite and ascend even where a double can't hold the sums") {
  std::mt19937 random(8);
  for (int i = 0; i < 200; ++i) {
    const std::vector<float> weights = random_powers(random, 40, -149, 127);
    const std::vector<float> lut =
        fitted(weights, random_powers(random, 40, -149, 127), 1 + random() % 20);
    REQUIRE(std::is_sorted(lut.begin(), lut.end()));
    REQUIRE(std::all_of(lut.begin(), lut.end(), [](float entry) { return std::isfinite(entry); }));
  }
}

TEST_CASE("counting halves gives what sorting floats gives") {
  std::mt19937 random(5);
  for (const std::size_t n : {100, 16'383, 16'384, 100'000, 3'000'000}) {
    for (const std::string shape : {"few values", "bell"}) {
      std::vector<Half> halves = random_weights<Half>(random, n, shape);
      for (const int bits : {0x8000, 0x0000, 0x7e00, 0xfc00, 0x7c00, 0xffff, 0x0001, 0x8001}) {
        halves[random() % n] = Half{static_cast<std::uint16_t>(bits)};
      }
      std::vector<float> floats;
      std::vector<float> finite;
      for (const Half half : halves) {
        floats.push_back(to_float(half));
        if (std::isfinite(floats.back())) {
          finite.push_back(floats.back());
        }
      }
      CAPTURE(n);
      if (shape == "few values") {
        CHECK(fitted(halves, {}, 16) == fitted(floats, {}, 16));
        const std::vector<float> importance = random_importance(random, n);
        CHECK(fitted(halves, importance, 16) == fitted(floats, importance, 16));
      } else {
        const WeightedValues data = distinct(finite, {});
        CHECK(error_of(data, fitted(halves, {}, 16)) <=
              (1 + kTolerance) * error_of(data, fitted(floats, {}, 16)) +
                  rounding_error<Half>(data));
      }
    }
  }
}

TEST_CASE_TEMPLATE("importance counts like repetition", T, Half, float) {
  std::mt19937 random(6);
  for (int i = 0; i < 100; ++i) {
    const std::vector<T> weights = random_weights<T>(random, 200, kShapes[i % kShapes.size()]);
    std::vector<T> repeated;
    std::vector<float> importance;
    for (const T weight : weights) {
      importance.push_back(static_cast<float>(random() % 5));
      repeated.insert(repeated.end(), static_cast<std::size_t>(importance.back()), weight);
    }
    CHECK(fitted(weights, importance, 6) == fitted(repeated, {}, 6));
  }
}

TEST_CASE_TEMPLATE("rows are independent, on any thread count", T, Half, float) {
  std::mt19937 random(7);
  const std::size_t n_rows = 9;
  const std::size_t n_cols = 1500;
  const std::vector<T> weights = random_weights<T>(random, n_rows * n_cols, "bell");
  std::vector<T> luts(n_rows * 8);
  const auto fit = [&](std::size_t n_threads) {
    const std::size_t before = set_thread_limit(n_threads);
    kmeans1d<T>({weights.data(), n_rows, n_cols}, {}, {luts.data(), n_rows, 8});
    set_thread_limit(before);
    return luts;
  };
  const std::vector<T> alone = fit(1);
  CHECK(fit(4) == alone);
  for (std::size_t row = 0; row < n_rows; ++row) {
    const std::vector<T> one(weights.begin() + row * n_cols, weights.begin() + (row + 1) * n_cols);
    const std::vector<float> lut = fitted(one, {}, 8);
    for (std::size_t j = 0; j < 8; ++j) {
      CHECK(to_float(alone[row * 8 + j]) == lut[j]);
    }
  }
}

TEST_CASE_TEMPLATE("few distinct values are all kept and the last is repeated", T, Half, float) {
  const auto fit = [](const std::vector<float>& values, std::vector<float> importance) {
    std::vector<T> weights;
    std::transform(values.begin(), values.end(), std::back_inserter(weights), from_float<T>);
    return fitted(weights, importance, 4);
  };
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  using Lut = std::vector<float>;
  CHECK(fit({}, {}) == Lut{0, 0, 0, 0});
  CHECK(fit({kNaN, kNaN}, {}) == Lut{0, 0, 0, 0});
  CHECK(fit({2, kNaN, -1, kInfinity, 2, -kInfinity}, {}) == Lut{-1, 2, 2, 2});
  CHECK(fit({3, -0.0F, 0.0F, 1, 2}, {}) == Lut{0, 1, 2, 3});
  CHECK(fit({1, 2, 3, 4, 5}, {1, 1, 1, 0, 1}) == Lut{1, 2, 3, 5});
  CHECK(fit({1, 2, 2, 1}, {0, 0, 0, 0}) == Lut{1, 2, 2, 2});
  CHECK(fit({1, 2, kNaN}, {0, 0, 1}) == Lut{1, 2, 2, 2});
}

TEST_CASE("a mean is rounded to half once, not by way of float") {
  // The mean is 2^-32 above the tie between 1 and 1 + 2^-10; in float it is the tie.
  const std::vector<Half> weights = {to_half(1), to_half(1 + 0x1p-10F)};
  CHECK(fitted(weights, {1, 1 + 0x1p-20F}, 1) == std::vector<float>{1 + 0x1p-10F});
  CHECK(fitted(weights, {1, 1}, 1) == std::vector<float>{1});
  CHECK(fitted(weights, {1 + 0x1p-20F, 1}, 1) == std::vector<float>{1});
}

TEST_CASE_TEMPLATE("importance adds up exactly beyond 2^24, where floats leave integers out", T,
                   Half, float) {
  // One more of the second value than of the first moves the mean off the tie between them, which
  // goes to the first.
  const float next = 1 + (sizeof(T) == 2 ? 0x1p-10F : 0x1p-23F);
  for (const std::size_t n : {3U, 1000U, 1U << 20}) {  // sorted, by bins, and in pieces
    CAPTURE(n);
    std::vector<T> weights(n);
    std::vector<float> importance(n);
    weights[0] = from_float<T>(1);
    weights[1] = from_float<T>(next);
    weights[2] = from_float<T>(next);
    importance[0] = 0x1p24F;
    importance[1] = 0x1p24F;
    CHECK(fitted(weights, importance, 1) == std::vector<float>{1});
    importance[2] = 1;
    CHECK(fitted(weights, importance, 1) == std::vector<float>{next});
  }
}

TEST_CASE("halves are counted exactly beyond 2^24") {
  // The mean of so many ones and eight of 1026 is the tie between 1 and 1 + 2^-10; of one less, it
  // is above.
  constexpr std::size_t kOnes = 2048 * 8200 - 8;
  static_assert(kOnes > std::size_t{1} << 24);
  std::vector<Half> weights(kOnes, to_half(1));
  weights.insert(weights.end(), 8, to_half(1026));
  CHECK(value_counts(weights).weights == std::vector<double>{kOnes, 8});
  CHECK(fitted(weights, {}, 1) == std::vector<float>{1});
  weights.erase(weights.begin());
  CHECK(value_counts(weights).weights == std::vector<double>{kOnes - 1, 8});
  CHECK(fitted(weights, {}, 1) == std::vector<float>{1 + 0x1p-10F});
}

TEST_CASE("kmeans1d refuses shapes that don't fit and importance that isn't one") {
  const std::vector<float> weights = {1, 2, 3, 4};
  std::vector<float> luts(4);
  const auto fit = [&](std::vector<float> importance, std::size_t n_rows, std::size_t n_entries) {
    kmeans1d<float>({weights.data(), 2, 2},
                    {importance.data(), importance.size() / 2, importance.empty() ? 0U : 2U},
                    {luts.data(), n_rows, n_entries});
  };
  CHECK_NOTHROW(fit({}, 2, 2));
  CHECK_NOTHROW(fit({1, 2, 3, 4}, 2, 2));
  CHECK_THROWS_AS(fit({}, 1, 2), std::invalid_argument);
  CHECK_THROWS_AS(fit({}, 2, 0), std::invalid_argument);
  CHECK_THROWS_AS(fit({1, 2}, 2, 2), std::invalid_argument);
  for (const float bad :
       {-1.0F, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    CHECK_THROWS_AS(fit({1, 2, 3, bad}, 2, 2), std::invalid_argument);
  }
}

}  // namespace
}  // namespace milpress
