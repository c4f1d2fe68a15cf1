#pragma once

#include <cassert>
#include <cstddef>
#include <span>

#include "core/check.h"

namespace milpress {

/// `n_rows` times `n_cols` elements, row after row without gaps, owned by someone else.
///
/// Kernels see a weight as such rows, one for each group or block that shares parameters.
template <typename T>
struct MatrixView {
  T* data = nullptr;
  std::size_t n_rows = 0;
  std::size_t n_cols = 0;

  std::size_t size() const { return n_rows * n_cols; }

  std::span<T> row(std::size_t i) const {
    assert(i < n_rows);
    return {data + i * n_cols, n_cols};
  }

  std::span<T> flat() const { return {data, size()}; }
};

/// Throws `std::invalid_argument` unless a matrix has that shape, which is that of `other`.
template <typename T>
void check_shape(const char* name, MatrixView<T> matrix, const char* other, std::size_t n_rows,
                 std::size_t n_cols) {
  check(matrix.n_rows == n_rows && matrix.n_cols == n_cols, name, " must have the shape of ", other,
        ", ", n_rows, " x ", n_cols, ", got ", matrix.n_rows, " x ", matrix.n_cols);
}

}  // namespace milpress
