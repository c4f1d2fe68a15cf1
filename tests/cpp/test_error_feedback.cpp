#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "core/parallel.h"
#include "kernels/error_feedback.h"

namespace milpress {
namespace {

constexpr double kPlace = 0x1p-23;  // twice half a last place of a float

struct Case {
  std::size_t n_rows;
  std::size_t n_cols;
  std::vector<float> factor;
  std::vector<float> weights;
};

struct Result {
  std::vector<float> weights;
  std::vector<std::uint8_t> codes;
  std::vector<std::uint8_t> kept;
  std::vector<float> errors;
};

// Below the diagonal stands what must not be read.
Case make_case(std::size_t n_rows, std::size_t n_cols, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Case made{n_rows, n_cols, std::vector<float>(n_cols * n_cols),
            std::vector<float>(n_rows * n_cols)};
  for (std::size_t i = 0; i < n_cols; ++i) {
    for (std::size_t j = 0; j < n_cols; ++j) {
      made.factor[i * n_cols + j] = i == j  ? 0.5F + std::abs(normal(random))
                                    : i < j ? normal(random) / 8
                                            : std::numeric_limits<float>::quiet_NaN();
    }
  }
  for (float& weight : made.weights) {
    weight = normal(random);
  }
  return made;
}

template <typename Grid>
Result run(const Case& given, const Grid& grid, Pruning pruning = {},
           const std::vector<std::uint8_t>& kept = {}) {
  const std::size_t n = given.n_rows * given.n_cols;
  const bool has_codes = !std::is_same_v<Grid, NoGrid>;
  const bool has_mask = !kept.empty() || pruning.m != 0;
  Result result{given.weights, std::vector<std::uint8_t>(has_codes ? n : 0), kept,
                std::vector<float>(n)};
  result.kept.resize(has_mask ? n : 0);
  const auto shaped = [&](auto& data) {
    using Element = typename std::remove_reference_t<decltype(data)>::value_type;
    return data.empty() ? MatrixView<Element>{}
                        : MatrixView<Element>{data.data(), given.n_rows, given.n_cols};
  };
  error_feedback<Grid>({given.factor.data(), given.n_cols, given.n_cols}, grid, pruning,
                       shaped(result.weights), shaped(result.kept), shaped(result.codes),
                       shaped(result.errors));
  return result;
}

double factor_at(const Case& given, std::size_t i, std::size_t j) {
  return given.factor[i * given.n_cols + j];
}

// What the kernel rounded: the weight with all earlier errors taken off.
double rounded_from(const Case& given, const Result& result, std::size_t row, std::size_t col) {
  double weight = given.weights[row * given.n_cols + col];
  for (std::size_t i = 0; i < col; ++i) {
    weight -= result.errors[row * given.n_cols + i] * factor_at(given, i, col);
  }
  return weight;
}

// How far that may be off in float: each of the updates rounds its product and its difference.
double slack(const Case& given, const Result& result, std::size_t row, std::size_t col) {
  double magnitude = std::abs(given.weights[row * given.n_cols + col]);
  for (std::size_t i = 0; i < col; ++i) {
    magnitude += std::abs(result.errors[row * given.n_cols + i] * factor_at(given, i, col));
  }
  return kPlace * static_cast<double>(col + 2) * magnitude;
}

// Every error is what rounding left of the weight, over the diagonal.
void check_errors(const Case& given, const Result& result) {
  for (std::size_t row = 0; row < given.n_rows; ++row) {
    for (std::size_t col = 0; col < given.n_cols; ++col) {
      const std::size_t i = row * given.n_cols + col;
      const double left = rounded_from(given, result, row, col) - result.weights[i];
      const double error = result.errors[i] * factor_at(given, col, col);
      CHECK(std::abs(left - error) <=
            slack(given, result, row, col) + kPlace * (std::abs(left) + std::abs(error)));
    }
  }
}

TEST_CASE("a column is rounded to the nearest integer after all errors before it") {
  for (const std::size_t n_cols : {1U, 2U, 7U, 8U, 33U, 128U}) {
    const Case given = make_case(5, n_cols, static_cast<unsigned>(n_cols));
    std::vector<float> scales;
    std::vector<float> offsets;
    std::vector<std::uint32_t> groups;
    for (std::size_t i = 0; i < 2 * given.n_rows; ++i) {
      scales.push_back((i % 3 == 0 ? -0.1F : 0.1F) + 0.01F * static_cast<float>(i % 5));
      offsets.push_back(static_cast<float>(5 + i % 7));
    }
    for (std::size_t i = 0; i < n_cols; ++i) {
      groups.push_back(i < n_cols / 2 ? 0 : 1);
    }
    const LinearGrid grid{{scales.data(), 5, 2}, {offsets.data(), 5, 2}, groups, 15};
    const Result result = run(given, grid);
    check_errors(given, result);
    for (std::size_t row = 0; row < given.n_rows; ++row) {
      for (std::size_t col = 0; col < n_cols; ++col) {
        const std::size_t i = row * n_cols + col;
        const float scale = scales[2 * row + groups[col]];
        const float offset = offsets[2 * row + groups[col]];
        const int code = result.codes[i];
        CHECK(result.weights[i] == scale * (static_cast<float>(code) - offset));
        const double wanted = rounded_from(given, result, row, col) / scale + offset;
        const double places =
            slack(given, result, row, col) / std::abs(scale) + kPlace * (std::abs(wanted) + 16);
        const bool is_below = code == 15 && wanted > 15;
        const bool is_above = code == 0 && wanted < 0;
        CHECK((is_below || is_above || std::abs(wanted - code) <= 0.5 + places));
      }
    }
  }
}

TEST_CASE("a column is assigned to the nearest entry after all errors before it") {
  for (const std::size_t n_entries : {1U, 2U, 5U, 16U, 256U}) {
    const Case given = make_case(6, 40, static_cast<unsigned>(n_entries));
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> luts(3 * n_entries);
    for (std::size_t i = 0; i < 3; ++i) {
      const auto begin = luts.begin() + static_cast<std::ptrdiff_t>(i * n_entries);
      std::generate_n(begin, n_entries, [&] { return normal(random); });
      std::sort(begin, begin + static_cast<std::ptrdiff_t>(n_entries));
    }
    // Rows 0, 2 and 4 have the first two tables, the others the last two.
    std::vector<std::uint32_t> lut_of;
    for (std::size_t row = 0; row < 6; ++row) {
      lut_of.push_back(row % 2);
      lut_of.push_back(row % 2 + 1);
    }
    std::vector<std::uint32_t> groups(40);
    for (std::size_t i = 0; i < 40; ++i) {
      groups[i] = i % 2;
    }
    const TableGrid grid{{luts.data(), 3, n_entries}, {lut_of.data(), 6, 2}, groups};
    const Result result = run(given, grid);
    check_errors(given, result);
    for (std::size_t row = 0; row < 6; ++row) {
      for (std::size_t col = 0; col < 40; ++col) {
        const std::size_t i = row * 40 + col;
        const float* const table = luts.data() + n_entries * lut_of[2 * row + groups[col]];
        CHECK(result.weights[i] == table[result.codes[i]]);
        const double wanted = rounded_from(given, result, row, col);
        double least = std::numeric_limits<double>::infinity();
        for (std::size_t k = 0; k < n_entries; ++k) {
          least = std::min(least, std::abs(wanted - table[k]));
        }
        // Twice the slack: it moves the weight away from one entry and towards another.
        CHECK(std::abs(wanted - result.weights[i]) <= least + 2 * slack(given, result, row, col));
      }
    }
  }
}

TEST_CASE("a weight that is not kept becomes zero, and the others make up for it") {
  const Case given = make_case(4, 24, 3);
  std::vector<std::uint8_t> kept(given.weights.size());
  for (std::size_t i = 0; i < kept.size(); ++i) {
    kept[i] = i % 3 == 0 ? 0 : 1;
  }
  const Result result = run(given, NoGrid{}, {}, kept);
  check_errors(given, result);
  for (std::size_t i = 0; i < kept.size(); ++i) {
    CHECK((result.weights[i] == 0) == (kept[i] == 0));
    CHECK((result.errors[i] == 0) == (kept[i] != 0));
  }
  CHECK(result.kept == kept);
}

TEST_CASE("of every m columns the n of least loss go, judged when their turn comes") {
  // 22 columns: five groups of four, and two columns of which one goes.
  const Case given = make_case(8, 22, 4);
  const Result result = run(given, NoGrid{}, {2, 4});
  check_errors(given, result);
  for (std::size_t row = 0; row < 8; ++row) {
    for (std::size_t begin = 0; begin < 22; begin += 4) {
      const std::size_t end = std::min<std::size_t>(begin + 4, 22);
      double greatest_gone = 0;
      double room = 0;
      double least_kept = std::numeric_limits<double>::infinity();
      std::size_t n_gone = 0;
      for (std::size_t col = begin; col < end; ++col) {
        // As it was when the group began: without the errors of the group itself.
        double weight = given.weights[row * 22 + col];
        for (std::size_t i = 0; i < begin; ++i) {
          weight -= result.errors[row * 22 + i] * factor_at(given, i, col);
        }
        const double loss = std::abs(weight / factor_at(given, col, col));
        room = std::max(room, slack(given, result, row, col) / factor_at(given, col, col));
        if (result.kept[row * 22 + col] == 0) {
          greatest_gone = std::max(greatest_gone, loss);
          ++n_gone;
        } else {
          least_kept = std::min(least_kept, loss);
        }
      }
      CHECK(n_gone == (end - begin) / 2);
      CHECK(greatest_gone <= least_kept + 2 * room);
    }
  }
}

// With no column that shares an error: what becomes of a weight is in the weight.
Case alone(const std::vector<float>& weights) {
  const std::size_t n = weights.size();
  Case made{1, n, std::vector<float>(n * n), weights};
  for (std::size_t i = 0; i < n; ++i) {
    made.factor[i * n + i] = 1;
  }
  return made;
}

TEST_CASE("of equals the even code, the lower entry and the later column stay") {
  const std::vector<float> one{1};
  const std::vector<float> zero{0};
  const std::vector<std::uint32_t> groups(6);
  const LinearGrid grid{{one.data(), 1, 1}, {zero.data(), 1, 1}, groups, 15};
  // The last, which is not a number, takes the lowest code, and so does what lies far below.
  const Case linear = alone({2.5F, 3.5F, 4.25F, 1e30F, -1e30F, NAN});
  CHECK(run(linear, grid).codes == std::vector<std::uint8_t>{2, 4, 4, 15, 0, 0});

  const std::vector<float> lut{-1, 0, 1};
  const std::vector<std::uint32_t> lut_of{0};
  const TableGrid table{{lut.data(), 1, 3}, {lut_of.data(), 1, 1}, groups};
  const Case between = alone({-0.5F, 0.5F, -0.25F, 0.75F, -7, 7});
  CHECK(run(between, table).codes == std::vector<std::uint8_t>{0, 1, 1, 2, 0, 2});

  const Case equal = alone({1, -1, 1, 1, -2, 2});
  CHECK(run(equal, NoGrid{}, {1, 3}).kept == std::vector<std::uint8_t>{0, 1, 1, 0, 1, 1});
}

TEST_CASE("tables that there aren't and more zeros than columns are refused") {
  const Case given = alone({1, 2});
  const std::vector<float> lut{-1, 0, 1};
  const std::vector<std::uint32_t> groups(2);
  for (const std::uint32_t beyond : {1U, 2U}) {
    const TableGrid grid{{lut.data(), 1, 3}, {&beyond, 1, 1}, groups};
    CHECK_THROWS_AS(run(given, grid), std::invalid_argument);
  }
  CHECK_THROWS_AS(run(given, NoGrid{}, {3, 2}), std::invalid_argument);
}

TEST_CASE("what is not kept has code 0") {
  const std::vector<float> one{1};
  const std::vector<float> offset{8};
  const std::vector<std::uint32_t> groups(3);
  const LinearGrid grid{{one.data(), 1, 1}, {offset.data(), 1, 1}, groups, 15};
  CHECK(run(alone({3, 3, 3}), grid, {}, {1, 0, 1}).codes == std::vector<std::uint8_t>{11, 0, 11});
}

TEST_CASE("the result does not depend on the number of threads") {
  const Case given = make_case(300, 256, 5);
  const std::vector<float> scales(300, 0.2F);
  const std::vector<float> offsets(300, 8.0F);
  const std::vector<std::uint32_t> groups(256);
  const LinearGrid grid{{scales.data(), 300, 1}, {offsets.data(), 300, 1}, groups, 15};
  const std::size_t before = set_thread_limit(1);
  const Result one = run(given, grid);
  set_thread_limit(3);
  const Result three = run(given, grid);
  set_thread_limit(before);
  CHECK(one.codes == three.codes);
  CHECK(one.errors == three.errors);
}

TEST_CASE("shapes that don't fit and factors that are none are refused") {
  const Case given = make_case(2, 3, 6);
  std::vector<float> weights = given.weights;
  std::vector<float> errors(6);
  std::vector<std::uint8_t> codes(6);
  const std::vector<float> scales{1, 1};
  const std::vector<float> offsets{0, 0};
  const std::vector<std::uint32_t> groups{0, 0, 0};
  const auto call = [&](const LinearGrid& grid, const std::vector<float>& factor,
                        std::size_t n_codes, Pruning pruning) {
    error_feedback<LinearGrid>({factor.data(), 3, 3}, grid, pruning, {weights.data(), 2, 3}, {},
                               {codes.data(), 2, n_codes}, {errors.data(), 2, 3});
  };
  const LinearGrid good{{scales.data(), 2, 1}, {offsets.data(), 2, 1}, groups, 15};
  CHECK_NOTHROW(call(good, given.factor, 3, {}));
  CHECK_THROWS_AS(call(good, given.factor, 2, {}), std::invalid_argument);
  CHECK_THROWS_AS(call(good, given.factor, 3, {1, 2}), std::invalid_argument);
  std::vector<float> singular = given.factor;
  singular[4] = 0;
  CHECK_THROWS_AS(call(good, singular, 3, {}), std::invalid_argument);
  LinearGrid wrong = good;
  const std::vector<std::uint32_t> beyond{0, 0, 1};
  wrong.groups = beyond;
  CHECK_THROWS_AS(call(wrong, given.factor, 3, {}), std::invalid_argument);
  wrong = good;
  wrong.code_max = 256;
  CHECK_THROWS_AS(call(wrong, given.factor, 3, {}), std::invalid_argument);
}

}  // namespace
}  // namespace milpress
