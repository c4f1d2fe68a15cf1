#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/buffer.h"
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

using Bytes = Array<std::uint8_t>;

/// An argument that is such an array.
inline py::arg exact(const char* name) { return py::arg(name).noconvert(); }

/// Calls `run` on views with Python's lock off. They are taken before, while it is held.
template <typename Run, typename... Views>
decltype(auto) unlocked(const Run& run, Views... views) {
  const py::gil_scoped_release released;
  return run(views...);
}

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

/// No view where there is no array.
template <typename T>
std::span<const T> view(const std::optional<Array<T>>& array) {
  return array ? view(*array) : std::span<const T>();
}

template <typename T>
MatrixView<const T> rows(const std::optional<Array<T>>& array) {
  return array ? rows(*array) : MatrixView<const T>{};
}

template <typename T>
MatrixView<T> mutable_rows(Array<T>& array) {
  const MatrixView<const T> matrix = rows(array);
  return {array.mutable_data(), matrix.n_rows, matrix.n_cols};
}

/// An array of that shape, whose memory is kept for the next one when it goes.
template <typename T>
Array<T> empty_shaped(std::vector<py::ssize_t> shape, std::size_t n) {
  auto buffer = std::make_unique<Buffer>(n * sizeof(T));
  const auto* const data = static_cast<const T*>(buffer->data());
  const py::capsule owner(buffer.get(), [](void* held) { delete static_cast<Buffer*>(held); });
  buffer.release();
  return Array<T>(std::move(shape), data, owner);
}

template <typename T>
Array<T> empty(std::size_t n) {
  return empty_shaped<T>({static_cast<py::ssize_t>(n)}, n);
}

template <typename T>
Array<T> empty(std::size_t n_rows, std::size_t n_cols) {
  return empty_shaped<T>({static_cast<py::ssize_t>(n_rows), static_cast<py::ssize_t>(n_cols)},
                         n_rows * n_cols);
}

/// A copy of `values`.
template <typename T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

/// An array with the rows and columns of `other`.
template <typename T, typename Other>
Array<T> empty_like(const Array<Other>& other) {
  const auto shape = rows(other);
  return empty<T>(shape.n_rows, shape.n_cols);
}

}  // namespace milpress
