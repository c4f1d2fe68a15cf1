#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#include "core/half.h"
#include "core/parallel.h"
#include "kernels/kmeans_vector.h"
#include "kernels/vector_exchange.h"
#include "kernels/vector_grid.h"
#include "kernels/vector_lloyd.h"
#include "kernels/vector_nearest.h"
#include "kernels/vectors.h"

namespace milpress {
namespace {

template <typename T>
struct Result {
  std::vector<T> luts;
  std::vector<std::uint8_t> codes;

  bool operator==(const Result&) const = default;
};

template <typename T>
Result<T> run(const std::vector<T>& weights, std::size_t n_rows, std::size_t n_entries,
              std::size_t dim, const std::vector<float>& importance = {}, std::uint64_t seed = 0) {
  const std::size_t n_cols = weights.size() / n_rows;
  const std::size_t n_vectors = n_cols / dim;
  Result<T> result{std::vector<T>(n_rows * n_entries * dim),
                   std::vector<std::uint8_t>(n_rows * n_vectors)};
  kmeans_vector<T>({weights.data(), n_rows, n_cols},
                   {importance.data(), importance.empty() ? 0 : n_rows, n_vectors}, {dim, seed},
                   {result.luts.data(), n_rows, n_entries * dim},
                   {result.codes.data(), n_rows, n_vectors});
  return result;
}

template <typename T>
double squared_distance(const T* a, const T* b, std::size_t dim) {
  double sum = 0;
  for (std::size_t d = 0; d < dim; ++d) {
    const double difference = double{to_float(a[d])} - to_float(b[d]);
    sum += difference * difference;
  }
  return sum;
}

template <typename T>
double squared_error(const std::vector<T>& weights, const Result<T>& result, std::size_t dim) {
  double error = 0;
  for (std::size_t i = 0; i < result.codes.size(); ++i) {
    error += squared_distance(&weights[i * dim], &result.luts[result.codes[i] * dim], dim);
  }
  return error;
}

// Multiples of 1/8, whose squared distances are exact: ties are ties.
template <typename T>
std::vector<T> tied_weights(std::size_t n, unsigned n_values = 33) {
  std::mt19937 random(static_cast<unsigned>(n));
  std::vector<T> weights(n);
  for (T& weight : weights) {
    weight = from_float<T>(static_cast<float>(random() % n_values) / 8 - 2);
  }
  return weights;
}

template <typename T>
std::vector<T> normal_weights(std::size_t n, float magnitude = 1) {
  std::mt19937 random(static_cast<unsigned>(n));
  std::normal_distribution<float> normal(0, magnitude);
  std::vector<T> weights(n);
  std::generate(weights.begin(), weights.end(), [&] { return from_float<T>(normal(random)); });
  return weights;
}

template <typename T>
bool ascends(const std::vector<T>& lut, std::size_t dim) {
  for (std::size_t j = dim; j < lut.size(); j += dim) {
    const auto less = [](T a, T b) { return to_float(a) < to_float(b); };
    const auto entry = lut.begin() + static_cast<std::ptrdiff_t>(j);
    const auto end = entry + static_cast<std::ptrdiff_t>(dim);
    if (std::lexicographical_compare(entry, end, entry - static_cast<std::ptrdiff_t>(dim), entry,
                                     less)) {
      return false;
    }
  }
  return true;
}

TEST_CASE_TEMPLATE("each vector has the code of the first of the nearest entries, which ascend", T,
                   Half, float) {
  for (const std::size_t dim : {1U, 2U, 3U, 4U, 5U, 8U, 16U}) {
    for (const std::size_t n : {1U, 2U, 31U, 32U, 33U, 300U, 9000U}) {
      for (const std::size_t n_entries : {1U, 2U, 3U, 16U, 17U, 256U}) {
        if (n * n_entries * dim > 1'000'000) {
          continue;
        }
        CAPTURE(dim);
        CAPTURE(n);
        CAPTURE(n_entries);
        const std::vector<T> weights = tied_weights<T>(n * dim, 9);
        const auto result = run(weights, 1, n_entries, dim);
        CHECK(ascends(result.luts, dim));
        std::size_t n_wrong = 0;
        for (std::size_t i = 0; i < n; ++i) {
          const auto distance = [&](std::size_t j) {
            return squared_distance(&weights[i * dim], &result.luts[j * dim], dim);
          };
          const double mine = distance(result.codes[i]);
          for (std::size_t j = 0; j < n_entries; ++j) {
            // The kernel adds up `dim` squares in float, each of a difference rounded once.
            const double slack = 1 + static_cast<double>(dim + 3) * 0x1p-23;
            n_wrong += distance(j) * slack < mine ? 1U : 0U;
            n_wrong += j < result.codes[i] && distance(j) == 0 ? 1U : 0U;
          }
        }
        CHECK(n_wrong == 0);
      }
    }
  }
}

TEST_CASE_TEMPLATE("no more distinct vectors than entries are all in the table, and no other", T,
                   Half, float) {
  for (const std::size_t dim : {1U, 2U, 3U, 8U}) {
    for (const std::size_t n_distinct : {1U, 2U, 15U, 16U}) {
      std::mt19937 random(static_cast<unsigned>(dim));
      std::set<std::vector<float>> distinct;
      while (distinct.size() < n_distinct) {
        std::vector<float> vector(dim);
        // Differences whose squares vanish in a float, and a zero of either sign.
        std::generate(vector.begin(), vector.end(), [&] {
          return static_cast<float>(static_cast<int>(random() % 33) - 16) * 0x1p-24F;
        });
        distinct.insert(vector);
      }
      const std::vector<std::vector<float>> vectors(distinct.begin(), distinct.end());
      std::vector<T> weights;
      for (std::size_t i = 0; i < 70; ++i) {
        for (const float value : vectors[i * 7 % n_distinct]) {
          weights.push_back(from_float<T>(value == 0 && i % 2 == 0 ? -0.0F : value));
        }
      }
      const auto result = run(weights, 1, 16, dim);
      for (std::size_t j = 0; j < 16; ++j) {
        for (std::size_t d = 0; d < dim; ++d) {
          CHECK(to_float(result.luts[j * dim + d]) == vectors[std::min(j, n_distinct - 1)][d]);
        }
      }
      for (std::size_t i = 0; i < 70; ++i) {
        CHECK(result.codes[i] == i * 7 % n_distinct);
      }
    }
  }
}

TEST_CASE("well separated clusters are found, each with its mean") {
  std::vector<float> weights;
  for (std::size_t i = 0; i < 64 * 12; ++i) {
    const auto x = static_cast<float>(i % 8);
    const auto y = static_cast<float>(i / 8 % 8);
    const float shift = i / 64 % 2 == 0 ? 0.0625F : -0.0625F;
    weights.insert(weights.end(), {x + shift, y - shift});
  }
  const auto result = run(weights, 1, 64, 2);
  for (std::size_t j = 0; j < 64; ++j) {
    CHECK(result.luts[2 * j] == static_cast<float>(j / 8));
    CHECK(result.luts[2 * j + 1] == static_cast<float>(j % 8));
  }
}

TEST_CASE("vectors too rare for the sample still get entries") {
  // Sixteen other vectors among zeros, for sixteen entries: the two that share one are close.
  const std::size_t n = 100'000;
  std::vector<float> weights(2 * n);
  for (std::size_t i = 0; i < 16; ++i) {
    weights[2 * (i * 4987 + 13)] = static_cast<float>(i + 1);
    weights[2 * (i * 4987 + 13) + 1] = static_cast<float>(i % 4);
  }
  const auto result = run(weights, 1, 16, 2);
  CHECK(squared_error(weights, result, 2) <= 1);
}

TEST_CASE("starts on a sample go where importance is") {
  // One vector in a hundred counts; they are sixteen, ten apart. The others lie far from all of
  // them.
  const std::size_t n = 40'000;
  std::mt19937 random(17);
  std::vector<float> weights;
  std::vector<float> importance;
  for (std::size_t i = 0; i < n; ++i) {
    const bool counts = i % 100 == 0;
    const auto j = static_cast<unsigned>(i / 100 % 16);
    const auto x = static_cast<float>(counts ? j % 4 * 10 : 100 + random() % 100);
    const auto y = static_cast<float>(counts ? j / 4 * 10 : 100 + random() % 100);
    weights.insert(weights.end(), {x, y});
    importance.push_back(counts ? 1.0F : 0x1p-40F);
  }
  const auto result = run(weights, 1, 16, 2, importance);
  double error = 0;
  for (std::size_t i = 0; i < n; i += 100) {
    error += squared_distance(&weights[2 * i], &result.luts[2 * result.codes[i]], 2);
  }
  // All the others together weigh 2^-24, and pull an entry of 25 vectors by less than a millionth.
  CHECK(error < 400 * 1e-12);
}

TEST_CASE_TEMPLATE("vectors without importance or not finite don't shape the table", T, Half,
                   float) {
  const std::size_t dim = 2;
  const std::size_t n = 500;
  std::vector<T> weights = normal_weights<T>(n * dim);
  std::vector<float> importance(n);
  std::vector<T> kept;
  std::vector<float> kept_importance;
  for (std::size_t i = 0; i < n; ++i) {
    if (i % 3 == 0) {
      importance[i] = i % 2 == 0 ? 0.0F : 5.0F;
      weights[2 * i] = from_float<T>(i % 2 == 0 ? 100.0F : INFINITY);
      weights[2 * i + 1] = from_float<T>(i % 4 < 2 ? 100.0F : NAN);
      if (i % 2 == 0) {
        weights[2 * i + 1] = from_float<T>(100.0F);
      }
    } else {
      importance[i] = static_cast<float>(i % 5 + 1);
      kept.insert(kept.end(), {weights[2 * i], weights[2 * i + 1]});
      kept_importance.push_back(importance[i]);
    }
  }
  const auto whole = run(weights, 1, 16, dim, importance);
  const auto part = run(kept, 1, 16, dim, kept_importance);
  CHECK(whole.luts == part.luts);
  std::size_t next = 0;
  const T far = from_float<T>(100.0F);
  const std::vector<T> corner{far, far};
  for (std::size_t i = 0; i < n; ++i) {
    if (i % 3 != 0) {
      CHECK(whole.codes[i] == part.codes[next++]);
    } else if (i % 2 != 0) {
      CHECK(whole.codes[i] == 0);
    } else {
      for (std::size_t j = 0; j < 16; ++j) {
        CHECK(squared_distance(corner.data(), &whole.luts[whole.codes[i] * dim], dim) <=
              squared_distance(corner.data(), &whole.luts[j * dim], dim) * (1 + 5 * 0x1p-23));
      }
    }
  }
}

TEST_CASE("importance pulls entries, and its unit doesn't matter") {
  const std::vector<float> weights{0, 0, 1, 0, 10, 10};
  const auto result = run(weights, 1, 2, 2, {1, 3, 1});
  CHECK(result.luts == std::vector<float>{0.75F, 0, 10, 10});
  const std::vector<float> normal = normal_weights<float>(4000);
  std::vector<float> importance(2000);
  for (std::size_t i = 0; i < importance.size(); ++i) {
    importance[i] = static_cast<float>(i % 7);
  }
  const auto expected = run(normal, 1, 16, 2, importance);
  for (const float unit : {0x1p-140F, 0x1p-60F, 0x1p120F}) {
    std::vector<float> scaled = importance;
    std::for_each(scaled.begin(), scaled.end(), [unit](float& share) { share *= unit; });
    CHECK(run(normal, 1, 16, 2, scaled) == expected);
  }
  CHECK(run(normal, 1, 16, 2, std::vector<float>(2000)) == run(normal, 1, 16, 2));
}

TEST_CASE("importance adds up exactly beyond 2^24, where floats leave integers out") {
  constexpr std::size_t kOnes = 65'536;
  std::vector<float> weights{1, -1};
  for (std::size_t i = 0; i < kOnes; ++i) {
    weights.insert(weights.end(), {2, -3});
  }
  std::vector<float> importance(kOnes + 1, 1.0F);
  importance[0] = 256 * static_cast<float>(kOnes);
  const auto result = run(weights, 1, 1, 2, importance);
  CHECK(result.luts ==
        std::vector<float>{static_cast<float>(258.0 / 257), static_cast<float>(-259.0 / 257)});
}

TEST_CASE("the magnitude of the weights doesn't matter") {
  std::vector<float> weights = normal_weights<float>(6000, 0.25F);
  std::for_each(weights.begin(), weights.end(),
                [](float& weight) { weight = std::round(weight * 64) / 64; });
  const auto expected = run(weights, 1, 32, 3);
  for (const float unit : {0x1p-100F, 0x1p-10F, 0x1p126F}) {
    std::vector<float> scaled = weights;
    std::for_each(scaled.begin(), scaled.end(), [unit](float& weight) { weight *= unit; });
    const auto result = run(scaled, 1, 32, 3);
    CHECK(result.codes == expected.codes);
    CHECK(std::equal(result.luts.begin(), result.luts.end(), expected.luts.begin(),
                     [unit](float a, float b) { return a == b * unit; }));
  }
}

TEST_CASE("the largest and the smallest weights cluster like any other") {
  for (const float magnitude : {65504.0F, 0x1p-22F}) {
    std::vector<Half> weights(4000);
    std::mt19937 random(3);
    for (Half& weight : weights) {
      weight = to_half(magnitude * (static_cast<float>(random() % 4096) / 2048 - 1));
    }
    const auto result = run(weights, 1, 16, 2);
    CHECK(std::all_of(result.luts.begin(), result.luts.end(),
                      [](Half entry) { return std::isfinite(to_float(entry)); }));
    // Sixteen squares of a quarter of the range's width each: a twelfth of it squared, twice.
    const double side = magnitude / 2;
    const double rounding = magnitude > 1 ? 0 : 0x1p-24 * 0x1p-24;
    CHECK(squared_error(weights, result, 2) < 2000 * (1.05 * side * side / 6 + rounding));
  }
}

TEST_CASE_TEMPLATE("rows are clustered as if they were alone, on one thread and on two", T, Half,
                   float) {
  struct Case {
    std::size_t n_rows;
    std::size_t n_vectors;
    std::size_t n_entries;
  };
  for (const auto& [n_rows, n_vectors, n_entries] :
       {Case{40, 100, 16}, Case{3, 9000, 4}, Case{2, 40'000, 8}}) {
    const std::size_t n_cols = n_vectors * 4;
    const std::vector<T> weights = normal_weights<T>(n_rows * n_cols);
    const std::size_t before = set_thread_limit(1);
    const auto one = run(weights, n_rows, n_entries, 4);
    set_thread_limit(2);
    const auto two = run(weights, n_rows, n_entries, 4);
    set_thread_limit(before);
    CHECK(one == two);
    const auto begin = weights.end() - static_cast<std::ptrdiff_t>(n_cols);
    const auto last = run(std::vector<T>(begin, weights.end()), 1, n_entries, 4);
    CHECK(std::equal(last.luts.rbegin(), last.luts.rend(), one.luts.rbegin()));
    CHECK(std::equal(last.codes.rbegin(), last.codes.rend(), one.codes.rbegin()));
  }
}

// Vectors of eighths, or of a normal distribution; every seventh of more importance.
Vectors some_vectors(std::size_t dim, std::size_t n, bool tied) {
  const std::vector<float> weights =
      tied ? tied_weights<float>(n * dim, 9) : normal_weights<float>(n * dim);
  Vectors vectors(dim, n);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t d = 0; d < dim; ++d) {
      vectors.at(i, d) = weights[i * dim + d] / 4;
    }
    vectors.shares[i] = i % 7 == 0 ? 2.0F : 1.0F;
  }
  return vectors;
}

Entries some_entries(const Vectors& vectors, std::size_t n_entries) {
  Random random(n_entries);
  return random_start(vectors, n_entries, random);
}

// Codes, distances and error as they are found one by one, bit for bit.
void check_assigned(const Vectors& vectors, const Entries& entries, const Lloyd& lloyd,
                    double error) {
  std::vector<std::uint8_t> codes(vectors.stride);
  std::vector<float> distances(vectors.stride);
  nearest_entries(entries, vectors.dim, vectors.values.data(), vectors.stride, vectors.stride,
                  codes.data(), distances.data());
  std::size_t n_wrong = 0;
  double expected = 0;
  for (std::size_t i = 0; i < vectors.count; ++i) {
    n_wrong += codes[i] != lloyd.codes()[i] || distances[i] != lloyd.distances()[i] ? 1U : 0U;
    expected += double{vectors.shares[i]} * distances[i];
    for (std::size_t j = 0; j < entries.size() / vectors.dim; ++j) {
      double squared = 0;
      for (std::size_t d = 0; d < vectors.dim; ++d) {
        const double difference = double{vectors.at(i, d)} - entries[j * vectors.dim + d];
        squared += difference * difference;
      }
      n_wrong += j != codes[i] && std::sqrt(squared) < lloyd.others()[i] ? 1U : 0U;
    }
  }
  CHECK(n_wrong == 0);
  CHECK(error == doctest::Approx(expected).epsilon(1e-6));  // sums of 32 in float
}

TEST_CASE("vectors held to bounds have the entries that a comparison with all finds") {
  for (const std::size_t dim : {1U, 2U, 3U, 4U, 5U, 8U}) {
    for (const std::size_t n : {33U, 3000U, 8300U}) {
      for (const std::size_t n_entries : {1U, 2U, 16U, 40U, 256U}) {
        for (const bool tied : {false, true}) {
          if (n * n_entries * dim > 3'000'000 || n_entries > n) {
            continue;
          }
          CAPTURE(dim);
          CAPTURE(n);
          CAPTURE(n_entries);
          CAPTURE(tied);
          const Vectors vectors = some_vectors(dim, n, tied);
          Entries entries = some_entries(vectors, n_entries);
          Lloyd lloyd(vectors);
          for (int turn = 0; turn < 6; ++turn) {
            const double error = lloyd.assign(entries);
            check_assigned(vectors, entries, lloyd, error);
            if (turn == 3) {
              lloyd.forget();
              lloyd.assign(entries);
              exchange(vectors, lloyd, 2.0, 4, entries);
            } else {
              lloyd.move(entries, turn % 2 == 0 ? 1.8 : 1.0);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("bounds hold when entries change places") {
  const Vectors vectors = some_vectors(2, 3000, true);
  Entries entries = some_entries(vectors, 40);
  Lloyd lloyd(vectors);
  lloyd.assign(entries);
  lloyd.move(entries);
  lloyd.assign(entries);
  std::vector<std::size_t> places(40);
  Entries reversed(entries.size());
  for (std::size_t j = 0; j < 40; ++j) {
    places[j] = 39 - j;
    reversed[2 * places[j]] = entries[2 * j];
    reversed[2 * places[j] + 1] = entries[2 * j + 1];
  }
  lloyd.reorder(places);
  check_assigned(vectors, reversed, lloyd, lloyd.assign(reversed));
  lloyd.move(reversed);
  check_assigned(vectors, reversed, lloyd, lloyd.assign(reversed));
}

TEST_CASE("a move goes to the means, which never adds to the error") {
  const Vectors vectors = some_vectors(2, 3000, false);
  Entries entries = some_entries(vectors, 16);
  Lloyd lloyd(vectors);
  double before = lloyd.assign(entries);
  for (int turn = 0; turn < 20; ++turn) {
    const std::vector<std::uint8_t> codes = lloyd.codes();
    lloyd.move(entries);
    std::vector<double> sums(entries.size());
    std::vector<double> weights(16);
    for (std::size_t i = 0; i < vectors.count; ++i) {
      weights[codes[i]] += vectors.shares[i];
      for (std::size_t d = 0; d < 2; ++d) {
        sums[codes[i] * 2U + d] += double{vectors.shares[i]} * vectors.at(i, d);
      }
    }
    for (std::size_t j = 0; j < entries.size(); ++j) {
      // The sums are kept up in another order than these are made.
      CHECK(entries[j] == doctest::Approx(sums[j] / weights[j / 2]).epsilon(1e-6));
    }
    const double error = lloyd.assign(entries);
    CHECK(error <= before * (1 + 1e-6));  // means are rounded to floats
    before = error;
  }
}

TEST_CASE("a grid keeps all vectors and their importance, and its cells are means") {
  for (const std::size_t dim : {1U, 2U}) {
    for (const bool tied : {false, true}) {
      const Vectors vectors = some_vectors(dim, 5000, tied);
      const Grid grid = merge(vectors, 4);
      std::set<std::uint32_t> places(grid.places.begin(), grid.places.end());
      CHECK(places.size() == vectors.count);
      REQUIRE(grid.ends.size() == grid.merged.count);
      REQUIRE(grid.ends.back() == vectors.count);
      CHECK(grid.merged.count > (tied ? 7U : 12U));  // of 16 cells along an element
      std::size_t n_wrong = 0;
      for (std::size_t cell = 0, i = 0; cell < grid.ends.size(); ++cell) {
        double shares = 0;
        std::vector<double> sums(dim);
        for (; i < grid.ends[cell]; ++i) {
          shares += grid.sorted.shares[i];
          n_wrong += grid.sorted.shares[i] != vectors.shares[grid.places[i]] ? 1U : 0U;
          for (std::size_t d = 0; d < dim; ++d) {
            n_wrong += grid.sorted.at(i, d) != vectors.at(grid.places[i], d) ? 1U : 0U;
            sums[d] += double{grid.sorted.shares[i]} * grid.sorted.at(i, d);
          }
        }
        CHECK(grid.merged.shares[cell] == shares);
        for (std::size_t d = 0; d < dim; ++d) {
          CHECK(grid.merged.at(cell, d) == static_cast<float>(sums[d] / shares));
        }
      }
      CHECK(n_wrong == 0);
    }
  }
}

TEST_CASE("cells that follow one another lie side by side") {
  // A vector for each cell, in rows.
  Vectors vectors(2, 16 * 16);
  for (std::size_t i = 0; i < vectors.count; ++i) {
    vectors.at(i, 0) = static_cast<float>(i % 16);
    vectors.at(i, 1) = static_cast<float>(i / 16);
    vectors.shares[i] = 1;
  }
  const Grid grid = merge(vectors, 4);
  REQUIRE(grid.merged.count == vectors.count);
  for (std::size_t i = 1; i < grid.merged.count; ++i) {
    const float across = grid.merged.at(i, 0) - grid.merged.at(i - 1, 0);
    const float along = grid.merged.at(i, 1) - grid.merged.at(i - 1, 1);
    CHECK(std::abs(across) + std::abs(along) == 1);
  }
}

TEST_CASE("an entry that helps nobody goes where one has too much to do") {
  // Two entries share a narrow cluster, two wide ones share the third.
  Vectors vectors(2, 300);
  const std::vector<float> spread = normal_weights<float>(600, 0.01F);
  for (std::size_t i = 0; i < 300; ++i) {
    vectors.at(i, 0) = spread[2 * i] + (i % 3 == 0 ? 0.0F : i % 3 == 1 ? 1.0F : 1.2F);
    vectors.at(i, 1) = spread[2 * i + 1];
    vectors.shares[i] = 1;
  }
  Entries entries{-0.001F, 0, 0.001F, 0, 1.1F, 0};
  Lloyd lloyd(vectors);
  const double before = lloyd.assign(entries);
  CHECK(exchange(vectors, lloyd, 0.9, 1, entries) == 1);
  double error = lloyd.assign(entries);
  lloyd.move(entries);
  error = lloyd.assign(entries);
  CHECK(error < before / 10);
  CHECK(exchange(vectors, lloyd, 0.5, 1, entries) == 0);
}

TEST_CASE("many vectors in a grid: the error is not above that of Lloyd's iteration alone") {
  const std::size_t n = 50'000;
  for (const float tail : {1.0F, 30.0F}) {
    std::vector<float> weights = normal_weights<float>(2 * n, 0.25F);
    for (std::size_t i = 0; i < weights.size(); i += 997) {
      weights[i] *= tail;
    }
    const auto result = run(weights, 1, 64, 2);
    Vectors vectors(2, n);
    for (std::size_t i = 0; i < n; ++i) {
      vectors.at(i, 0) = weights[2 * i];
      vectors.at(i, 1) = weights[2 * i + 1];
      vectors.shares[i] = 1;
    }
    Entries entries = some_entries(vectors, 64);
    Lloyd lloyd(vectors);
    double error = lloyd.assign(entries);
    for (int turn = 0; turn < 30; ++turn) {
      lloyd.move(entries);
      error = lloyd.assign(entries);
    }
    CHECK(squared_error(weights, result, 2) <= error);
    std::size_t n_wrong = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const double mine = squared_distance(&weights[2 * i], &result.luts[result.codes[i] * 2U], 2);
      for (std::size_t j = 0; j < 64; ++j) {
        // Two squares added up in float, each of a difference rounded once.
        const double slack = 1 + 5 * 0x1p-23;
        n_wrong +=
            squared_distance(&weights[2 * i], &result.luts[2 * j], 2) * slack < mine ? 1U : 0U;
      }
    }
    CHECK(n_wrong == 0);
  }
}

TEST_CASE("what has no say among many vectors still gets the nearest entry, whatever the threads") {
  const std::size_t n = 40'000;
  std::vector<float> weights = normal_weights<float>(2 * n);
  std::vector<float> importance(n);
  for (std::size_t i = 0; i < n; ++i) {
    importance[i] = static_cast<float>(i % 5);
    if (i % 1000 == 1) {
      weights[2 * i] = INFINITY;
    }
  }
  const std::size_t before = set_thread_limit(1);
  const auto one = run(weights, 1, 64, 2, importance);
  set_thread_limit(2);
  const auto two = run(weights, 1, 64, 2, importance);
  set_thread_limit(before);
  CHECK(one == two);
  std::size_t n_wrong = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (i % 1000 == 1) {
      n_wrong += one.codes[i] != 0 ? 1U : 0U;
      continue;
    }
    const double mine = squared_distance(&weights[2 * i], &one.luts[one.codes[i] * 2U], 2);
    for (std::size_t j = 0; j < 64; ++j) {
      n_wrong += squared_distance(&weights[2 * i], &one.luts[2 * j], 2) * (1 + 5 * 0x1p-23) < mine
                     ? 1U
                     : 0U;
    }
  }
  CHECK(n_wrong == 0);
}

TEST_CASE("rare vectors of many elements far out get entries, though a sample shapes the table") {
  // Two behind one another in each of eight directions, which would share an entry if the sample
  // had neither.
  const std::size_t n = 60'000;
  std::vector<float> weights = normal_weights<float>(4 * n, 0.0625F);
  for (std::size_t j = 0; j < 16; ++j) {
    for (std::size_t d = 0; d < 4; ++d) {
      const float away = j < 8 ? 16.0F : 20.0F;
      weights[4 * (j * 3701 + 5) + d] = (j >> (d % 3) & 1) != 0 ? away : -away;
    }
  }
  const auto result = run(weights, 1, 64, 4);
  for (std::size_t j = 0; j < 16; ++j) {
    const std::size_t i = j * 3701 + 5;
    CHECK(squared_distance(&weights[4 * i], &result.luts[4U * result.codes[i]], 4) == 0);
  }
}

TEST_CASE("the seed decides the table, and repeats it") {
  const std::vector<float> weights = normal_weights<float>(20'000);
  CHECK(run(weights, 1, 64, 2, {}, 1) == run(weights, 1, 64, 2, {}, 1));
  CHECK(run(weights, 1, 64, 2, {}, 1) != run(weights, 1, 64, 2, {}, 2));
}

TEST_CASE("empty rows get zeros, and shapes and importance that don't fit are refused") {
  std::vector<float> luts(8, 1.0F);
  kmeans_vector<float>({nullptr, 2, 0}, {}, {2, 0}, {luts.data(), 2, 4}, {nullptr, 2, 0});
  CHECK(luts == std::vector<float>(8));
  kmeans_vector<float>({nullptr, 0, 6}, {}, {2, 0}, {nullptr, 0, 4}, {nullptr, 0, 3});

  const std::vector<float> weights(24);
  std::vector<float> table(4 * 257);
  std::vector<std::uint8_t> codes(24);
  std::vector<float> importance(12, 1.0F);
  const auto call = [&](std::size_t dim, std::size_t n_luts, std::size_t n_elements,
                        std::size_t n_codes, std::size_t n_shares) {
    kmeans_vector<float>({weights.data(), 2, 12},
                         {importance.data(), n_shares > 0 ? 2U : 0U, n_shares}, {dim, 0},
                         {table.data(), n_luts, n_elements}, {codes.data(), 2, n_codes});
  };
  CHECK_NOTHROW(call(2, 2, 2, 6, 6));
  CHECK_NOTHROW(call(2, 2, 512, 6, 0));
  CHECK_THROWS_AS(call(0, 2, 2, 6, 6), std::invalid_argument);
  CHECK_THROWS_AS(call(5, 2, 10, 2, 2), std::invalid_argument);
  CHECK_THROWS_AS(call(2, 1, 2, 6, 6), std::invalid_argument);
  CHECK_THROWS_AS(call(2, 2, 3, 6, 6), std::invalid_argument);
  CHECK_THROWS_AS(call(2, 2, 0, 6, 6), std::invalid_argument);
  CHECK_THROWS_AS(call(2, 2, 514, 6, 6), std::invalid_argument);
  CHECK_THROWS_AS(call(2, 2, 2, 5, 6), std::invalid_argument);
  CHECK_THROWS_AS(call(2, 2, 2, 6, 5), std::invalid_argument);
  for (const float bad : {-1.0F, NAN, INFINITY}) {
    importance[11] = bad;
    CHECK_THROWS_AS(call(2, 2, 2, 6, 6), std::invalid_argument);
  }
}

}  // namespace
}  // namespace milpress
