#pragma once

#include <cstddef>
#include <span>

#include "core/half.h"
#include "core/matrix.h"

namespace milpress {

/// Writes to each row of `luts` the 2^b table entries that minimise
/// `sum_i importance_i * (weight_i - nearest entry)^2` over the same row of `weights`, exactly.
///
/// The optimum is found among the distinct values in double precision, its means are rounded to
/// `T`, and table and assignment are then improved in turn until neither changes, so that the
/// rounded table is never worse than the rounded means. Entries ascend. A row with fewer distinct
/// values than entries gets them all, the last one repeated; an empty row gets zeros.
///
/// `importance` has the shape of `weights`, finite and not negative, or no rows at all for equal
/// importance; a row whose importance is all zero counts as equal. Weights that are not finite are
/// ignored. The result does not depend on the core count; where several tables are optimal, the
/// rows before may decide which one a row gets.
template <typename T>
void kmeans1d(MatrixView<const T> weights, MatrixView<const float> importance, MatrixView<T> luts);

/// Throws `std::invalid_argument` unless the shapes are as above.
template <typename T>
void check_kmeans1d(MatrixView<const T> weights, MatrixView<const float> importance,
                    MatrixView<T> luts) {
  check(luts.n_rows == weights.n_rows, "luts must have ", weights.n_rows,
        " rows like weights, got ", luts.n_rows);
  check(luts.n_rows == 0 || luts.n_cols > 0, "luts must have at least 1 entry a row");
  if (importance.n_rows > 0) {
    check_shape("importance", importance, "weights", weights.n_rows, weights.n_cols);
  }
}

/// Throws `std::invalid_argument` unless `importance` is finite and not negative.
void check_importance(std::span<const float> importance);

}  // namespace milpress
