#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/matrix.h"

namespace milpress {

/// A scale and an offset for each row and group of columns: code `c`, from 0 to `code_max`, stands
/// for `scale * (c - offset)`.
struct LinearGrid {
  MatrixView<const float> scales;         // (n_rows, n_groups), none of them zero
  MatrixView<const float> offsets;        // (n_rows, n_groups)
  std::span<const std::uint32_t> groups;  // (n_cols), the group of each column
  int code_max = 255;
};

/// A lookup table for each row and group of columns: code `c` stands for entry `c`.
struct TableGrid {
  MatrixView<const float> luts;            // (n_luts, n_entries), rows ascending, 1 to 256 entries
  MatrixView<const std::uint32_t> lut_of;  // (n_rows, n_groups)
  std::span<const std::uint32_t> groups;   // (n_cols), the group of each column
};

/// Values as they are: nothing is rounded.
struct NoGrid {};

/// Of every `m` consecutive columns, in each row, `n` are to become zero; 0 of 0 for none.
struct Pruning {
  std::size_t n = 0;
  std::size_t m = 0;
};

/// Rounds the columns of a panel of a weight from left to right, each time adding to the columns
/// that are still to come what makes up best for the error in the layer's output: the inner loop of
/// GPTQ (Frantar et al. 2022, arXiv 2210.17323) and SparseGPT (arXiv 2301.00774).
///
/// `factor` is the panel's diagonal block of the upper Cholesky factor of the inverse of the
/// inputs' second moments, `(n_cols, n_cols)`; what is below the diagonal is not read, the diagonal
/// must be positive. `weights` receives what the codes stand for, `codes` the codes (with `NoGrid`
/// it is empty), `errors` the error of each column divided by its diagonal element: columns beyond
/// the panel have to lose `errors` times their block of the factor.
///
/// Where `kept` is 0 the weight becomes 0, its code too; if `kept` is empty all are kept. With
/// `pruning`, `kept` is written instead: of each `m` columns those go for which the square of the
/// weight, as it is by then, over that of the diagonal is least, the first of equals; of fewer
/// columns at the end, as large a part.
///
/// Weights and factor are finite. Quotients are rounded half to even; a weight halfway between two
/// entries takes the lower one. The result does not depend on the core count.
template <typename Grid>
void error_feedback(MatrixView<const float> factor, const Grid& grid, Pruning pruning,
                    MatrixView<float> weights, MatrixView<std::uint8_t> kept,
                    MatrixView<std::uint8_t> codes, MatrixView<float> errors);

}  // namespace milpress
