#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/half.h"
#include "core/matrix.h"

namespace milpress {

constexpr std::size_t kMaxEntries = 256;  // a code is one byte

/// Writes to `codes` the index of the entry of the same row of `luts` nearest to each weight.
///
/// A row of `luts` is ascending, 1 to 256 entries, infinite ones allowed. A weight halfway between
/// two entries takes the lower one; NaN takes entry 0. Of equal entries, the weights above them
/// take the last and the others the first. The result does not depend on the core count.
template <typename T>
void lut_assign(MatrixView<const T> weights, MatrixView<const T> luts,
                MatrixView<std::uint8_t> codes);

/// Writes to `weights` the entry of the same row of `luts` that each code names.
///
/// Throws `std::invalid_argument` if a code is not below the number of entries.
template <typename T>
void lut_to_dense(MatrixView<const std::uint8_t> codes, MatrixView<const T> luts,
                  MatrixView<T> weights);

/// Throws `std::invalid_argument` unless there is a table of 1 to `kMaxEntries` entries for each of
/// `n_rows` rows.
template <typename T>
void check_luts(MatrixView<const T> luts, std::size_t n_rows) {
  check(luts.n_rows == n_rows, "luts must have ", n_rows, " rows like weights, got ", luts.n_rows);
  check(n_rows == 0 || (luts.n_cols >= 1 && luts.n_cols <= kMaxEntries), "luts must have 1 to ",
        kMaxEntries, " entries a row, got ", luts.n_cols);
}

/// Throws `std::invalid_argument` unless the shapes are those that `lut_assign` takes.
template <typename T>
void check_lut_assign(MatrixView<const T> weights, MatrixView<const T> luts,
                      MatrixView<std::uint8_t> codes) {
  check_luts(luts, weights.n_rows);
  check_shape("codes", codes, "weights", weights.n_rows, weights.n_cols);
}

/// Throws `std::invalid_argument` unless `codes` are below `n_entries`.
void check_codes(std::span<const std::uint8_t> codes, std::size_t n_entries);

/// For each pair of neighbours in `lut`, the largest float that is not nearer to the upper one. A
/// weight's nearest entry is the number of midpoints below it.
template <typename T>
std::vector<float> midpoint_table(std::span<const T> lut);

}  // namespace milpress
