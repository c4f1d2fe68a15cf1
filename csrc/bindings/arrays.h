#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <span>

#include "core/half.h"
#include "core/matrix.h"

namespace pybind11::detail {

template <>
struct npy_format_descriptor<milpress::Half> {
  static constexpr auto name = const_name("numpy.float16");
  static pybind11::dtype dtype() { return pybind11::dtype("e"); }
};

}  // namespace pybind11::detail

namespace milpress {

namespace py = pybind11;

/// A C-contiguous NumPy array of exactly `T`; anything else is a TypeError, never a copy.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

template <typename T>
std::span<T> mutable_view(Array<T>& array) {
  return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

/// The array as rows; it must have two dimensions.
template <typename T>
MatrixView<const T> rows(const Array<T>& array) {
  if (array.ndim() != 2) {
    throw py::value_error("array must have 2 dimensions, got " + std::to_string(array.ndim()));
  }
  return {array.data(), static_cast<std::size_t>(array.shape(0)),
          static_cast<std::size_t>(array.shape(1))};
}

template <typename T>
MatrixView<T> mutable_rows(Array<T>& array) {
  const MatrixView<const T> matrix = rows(array);
  return {array.mutable_data(), matrix.n_rows, matrix.n_cols};
}

template <typename T>
Array<T> empty(std::size_t n) {
  return Array<T>(static_cast<py::ssize_t>(n));
}

template <typename T>
Array<T> empty(std::size_t n_rows, std::size_t n_cols) {
  return Array<T>({static_cast<py::ssize_t>(n_rows), static_cast<py::ssize_t>(n_cols)});
}

}  // namespace milpress
