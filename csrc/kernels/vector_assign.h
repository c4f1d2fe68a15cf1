#pragma once

#include <cstddef>
#include <cstdint>

#include "core/half.h"
#include "core/matrix.h"
#include "kernels/lut_assign.h"

namespace milpress {

/// Writes to each row of `codes` the index of the entry of the same row of `luts` nearest to each
/// vector of `weights`, found as `kmeans_vector` finds it.
template <typename T>
void vector_assign(MatrixView<const T> weights, std::size_t dim, MatrixView<const T> luts,
                   MatrixView<std::uint8_t> codes);

/// Throws `std::invalid_argument` unless the shapes are those of vectors of `dim` weights and of
/// their tables, of 1 to `kMaxEntries` entries.
template <typename T>
void check_vectors(MatrixView<const T> weights, std::size_t dim, std::size_t n_luts,
                   std::size_t n_in_lut, MatrixView<std::uint8_t> codes) {
  check(dim > 0 && weights.n_cols % dim == 0, "dim must divide the ", weights.n_cols,
        " weights of a row, got ", dim);
  check(n_luts == weights.n_rows, "luts must have ", weights.n_rows, " rows like weights, got ",
        n_luts);
  check(n_luts == 0 || (n_in_lut % dim == 0 && n_in_lut >= dim && n_in_lut / dim <= kMaxEntries),
        "luts must have 1 to ", kMaxEntries, " entries of ", dim, " a row, got ", n_in_lut,
        " elements");
  const std::size_t n_vectors = weights.n_cols / dim;
  check(codes.n_rows == weights.n_rows && codes.n_cols == n_vectors,
        "codes must have one element a vector, ", weights.n_rows, " x ", n_vectors, ", got ",
        codes.n_rows, " x ", codes.n_cols);
}

}  // namespace milpress
