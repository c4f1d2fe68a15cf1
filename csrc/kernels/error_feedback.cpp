#include "kernels/error_feedback.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "core/vectorize.h"
#include "kernels/linear_step.h"
#include "kernels/lut_assign.h"

namespace milpress {
namespace {

constexpr std::size_t kGrain = 4'194'304;  // updates of weights that a thread makes at a time

struct Rounded {
  float value;
  std::uint8_t code;
};

constexpr float clamp(float value, float low, float high) {
  value = value > low ? value : low;
  return value < high ? value : high;
}

struct LinearRounder {
  const LinearGrid& grid;

  Rounded operator()(std::size_t row, std::size_t col, float weight) const {
    const std::size_t i = row * grid.scales.n_cols + grid.groups[col];
    const float scale = grid.scales.data[i];
    const float offset = grid.offsets.data[i];
    // Limits far beyond any code, so that the rounding trick holds. NaN takes the lower one.
    const float quotient = clamp(weight / scale, -65536.0F, 65536.0F);
    const float code =
        clamp(round_even(quotient) + offset, 0.0F, static_cast<float>(grid.code_max));
    return {scale * (code - offset), static_cast<std::uint8_t>(code)};
  }
};

struct TableRounder {
  const TableGrid& grid;
  const std::vector<float>& midpoints;  // (n_luts, n_midpoints), rows padded with infinity
  std::size_t n_midpoints;              // a power of two less one

  Rounded operator()(std::size_t row, std::size_t col, float weight) const {
    const std::size_t lut = grid.lut_of.data[row * grid.lut_of.n_cols + grid.groups[col]];
    const float* const table = midpoints.data() + lut * n_midpoints;
    std::size_t code = 0;
    for (std::size_t step = (n_midpoints + 1) / 2; step > 0; step /= 2) {
      code += table[code + step - 1] < weight ? step : 0;
    }
    return {grid.luts.data[lut * grid.luts.n_cols + code], static_cast<std::uint8_t>(code)};
  }
};

struct NoRounder {
  Rounded operator()(std::size_t /*row*/, std::size_t /*col*/, float weight) const {
    return {weight, 0};
  }
};

// Marks the `n` of `m` columns from `begin` on that matter least.
void choose(const float* weights, const MatrixView<const float>& factor, std::size_t begin,
            Pruning pruning, std::uint8_t* kept) {
  const std::size_t end = std::min(begin + pruning.m, factor.n_cols);
  std::fill(kept + begin, kept + end, std::uint8_t{1});
  const std::size_t n_zeros = pruning.n * (end - begin) / pruning.m;
  for (std::size_t k = 0; k < n_zeros; ++k) {
    std::size_t least = end;
    float least_loss = std::numeric_limits<float>::infinity();
    for (std::size_t i = begin; i < end; ++i) {
      const float share = weights[i] / factor.data[i * factor.n_cols + i];
      if (kept[i] != 0 && (least == end || share * share < least_loss)) {
        least = i;
        least_loss = share * share;
      }
    }
    kept[least] = 0;
  }
}

// Rows `begin` to `end`. A row depends on no other.
template <typename Rounder>
MILPRESS_VECTORIZE void feed_back_rows(const Rounder& rounder, MatrixView<const float> factor,
                                       Pruning pruning, MatrixView<float> weights,
                                       MatrixView<std::uint8_t> kept,
                                       MatrixView<std::uint8_t> codes, MatrixView<float> errors,
                                       std::size_t begin, std::size_t end) {
  const std::size_t n = factor.n_cols;
  for (std::size_t row = begin; row < end; ++row) {
    float* const weight = weights.data + row * n;
    float* const error = errors.data + row * n;
    std::uint8_t* const keep = kept.size() == 0 ? nullptr : kept.data + row * n;
    for (std::size_t i = 0; i < n; ++i) {
      if (pruning.m != 0 && i % pruning.m == 0) {
        choose(weight, factor, i, pruning, keep);
      }
      const bool is_kept = keep == nullptr || keep[i] != 0;
      const Rounded rounded = is_kept ? rounder(row, i, weight[i]) : Rounded{0.0F, 0};
      const float* const share = factor.data + i * n;
      const float scaled = (weight[i] - rounded.value) / share[i];
      weight[i] = rounded.value;
      error[i] = scaled;
      if (codes.size() != 0) {
        codes.data[row * n + i] = rounded.code;
      }
      for (std::size_t j = i + 1; j < n; ++j) {
        weight[j] -= scaled * share[j];
      }
    }
  }
}

void check_groups(std::span<const std::uint32_t> groups, std::size_t n_cols, std::size_t n_groups) {
  check(groups.size() == n_cols, "groups must have ", n_cols, " elements, one a column, got ",
        groups.size());
  check(std::all_of(groups.begin(), groups.end(), [&](auto group) { return group < n_groups; }),
        "groups must be below ", n_groups);
}

template <typename Rounder>
void feed_back(const Rounder& rounder, MatrixView<const float> factor, Pruning pruning,
               MatrixView<float> weights, MatrixView<std::uint8_t> kept,
               MatrixView<std::uint8_t> codes, MatrixView<float> errors) {
  const std::size_t work = std::max<std::size_t>(1, factor.n_cols * factor.n_cols / 2);
  parallel_for(weights.n_rows, std::max<std::size_t>(1, kGrain / work),
               [&](std::size_t begin, std::size_t end) {
                 feed_back_rows(rounder, factor, pruning, weights, kept, codes, errors, begin, end);
               });
}

}  // namespace

template <typename Grid>
void error_feedback(MatrixView<const float> factor, const Grid& grid, Pruning pruning,
                    MatrixView<float> weights, MatrixView<std::uint8_t> kept,
                    MatrixView<std::uint8_t> codes, MatrixView<float> errors) {
  const std::size_t n_rows = weights.n_rows;
  const std::size_t n_cols = weights.n_cols;
  check(factor.n_rows == n_cols && factor.n_cols == n_cols, "factor must be ", n_cols, " x ",
        n_cols, ", got ", factor.n_rows, " x ", factor.n_cols);
  for (std::size_t i = 0; i < n_cols; ++i) {
    check(factor.data[i * n_cols + i] > 0, "the diagonal of factor must be positive, got ",
          factor.data[i * n_cols + i], " at ", i);
  }
  check_shape("errors", errors, "weights", n_rows, n_cols);
  if (kept.size() > 0 || pruning.m > 0) {
    check_shape("kept", kept, "weights", n_rows, n_cols);
  }
  check(pruning.n <= pruning.m, "pruning must be n of m, n not above m, got ", pruning.n, " of ",
        pruning.m);
  if (n_rows == 0 || n_cols == 0) {
    return;
  }
  if constexpr (std::is_same_v<Grid, NoGrid>) {
    check(codes.size() == 0, "codes must be empty without a grid");
    feed_back(NoRounder{}, factor, pruning, weights, kept, MatrixView<std::uint8_t>{}, errors);
    return;
  } else {
    check_shape("codes", codes, "weights", n_rows, n_cols);
  }
  if constexpr (std::is_same_v<Grid, LinearGrid>) {
    const std::size_t n_groups = grid.scales.n_cols;
    check(grid.scales.n_rows == n_rows, "scales must have ", n_rows, " rows, got ",
          grid.scales.n_rows);
    check_shape("offsets", grid.offsets, "scales", n_rows, n_groups);
    check(grid.code_max >= 0 && grid.code_max <= 255, "code_max must be from 0 to 255, got ",
          grid.code_max);
    check_groups(grid.groups, n_cols, n_groups);
    feed_back(LinearRounder{grid}, factor, pruning, weights, kept, codes, errors);
  }
  if constexpr (std::is_same_v<Grid, TableGrid>) {
    const std::size_t n_entries = grid.luts.n_cols;
    check(n_entries >= 1 && n_entries <= kMaxEntries, "a table must have 1 to ", kMaxEntries,
          " entries, got ", n_entries);
    check(grid.lut_of.n_rows == n_rows, "lut_of must have ", n_rows, " rows, got ",
          grid.lut_of.n_rows);
    const auto tables = grid.lut_of.flat();
    check(
        std::all_of(tables.begin(), tables.end(), [&](auto lut) { return lut < grid.luts.n_rows; }),
        "lut_of must be below ", grid.luts.n_rows);
    check_groups(grid.groups, n_cols, grid.lut_of.n_cols);
    const std::size_t n_midpoints = std::bit_ceil(n_entries) - 1;
    std::vector<float> midpoints(grid.luts.n_rows * n_midpoints,
                                 std::numeric_limits<float>::infinity());
    for (std::size_t i = 0; i < grid.luts.n_rows; ++i) {
      const std::vector<float> table = midpoint_table(grid.luts.row(i));
      std::copy_n(table.begin(), n_entries - 1,
                  midpoints.begin() + static_cast<std::ptrdiff_t>(i * n_midpoints));
    }
    feed_back(TableRounder{grid, midpoints, n_midpoints}, factor, pruning, weights, kept, codes,
              errors);
  }
}

#define MILPRESS_INSTANTIATE(Grid)                                                               \
  template void error_feedback(MatrixView<const float>, const Grid&, Pruning, MatrixView<float>, \
                               MatrixView<std::uint8_t>, MatrixView<std::uint8_t>,               \
                               MatrixView<float>);

MILPRESS_INSTANTIATE(LinearGrid)
MILPRESS_INSTANTIATE(TableGrid)
MILPRESS_INSTANTIATE(NoGrid)

}  // namespace milpress
