#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>

#include "bindings/arrays.h"
#include "core/matrix.h"
#include "kernels/quantize.h"
#include "kernels/sparsify.h"

namespace milpress {

/// Calls of kernels that the processor and the GPU both have: arrays in, `run` on views with the
/// lock off, new arrays out.

using Bytes = Array<std::uint8_t>;

template <typename T, typename Run>
Array<T> luts_by(const Array<T>& weights, std::size_t n_entries,
                 const std::optional<Array<float>>& importance, const Run& run) {
  const auto in = rows(weights);
  const auto weight_of = importance ? rows(*importance) : MatrixView<const float>{};
  auto luts = empty<T>(in.n_rows, n_entries);
  const auto out = mutable_rows(luts);
  {
    const py::gil_scoped_release unlocked;
    run(in, weight_of, out);
  }
  return luts;
}

template <typename T, typename Run>
Bytes codes_by(const Array<T>& weights, const Array<T>& luts, const Run& run) {
  const auto in = rows(weights);
  const auto entries = rows(luts);
  auto codes = empty<std::uint8_t>(in.n_rows, in.n_cols);
  const auto out = mutable_rows(codes);
  {
    const py::gil_scoped_release unlocked;
    run(in, entries, out);
  }
  return codes;
}

template <typename Code, typename T, typename Run>
py::tuple quantized_to(const Array<T>& weights, CodeRange range, bool fit_offset, const Run& run) {
  const auto in = rows(weights);
  auto codes = empty<Code>(in.n_rows, in.n_cols);
  auto scales = empty<T>(in.n_rows);
  auto offsets = empty<Code>(fit_offset ? in.n_rows : 0);
  const auto out = mutable_rows(codes);
  const auto scale_of = mutable_view(scales);
  const auto offset_of = mutable_view(offsets);
  {
    const py::gil_scoped_release unlocked;
    run(in, range, scale_of, offset_of, out);
  }
  return py::make_tuple(codes, scales, fit_offset ? py::object(offsets) : py::none());
}

/// `run` takes codes of either sign.
template <typename T, typename Run>
py::tuple quantized_by(const Array<T>& weights, int code_min, int code_max, bool fit_offset,
                       const Run& run) {
  const CodeRange range{code_min, code_max};
  return code_min < 0 ? quantized_to<std::int8_t>(weights, range, fit_offset, run)
                      : quantized_to<std::uint8_t>(weights, range, fit_offset, run);
}

template <typename T, typename Run>
Bytes bitmask_by(const Array<T>& weights, const Run& run) {
  const auto in = view(weights);
  auto bitmask = empty<std::uint8_t>((in.size() + 7) / 8);
  const auto out = mutable_view(bitmask);
  {
    const py::gil_scoped_release unlocked;
    run(in, out);
  }
  return bitmask;
}

template <typename T, typename Run>
Array<T> nonzeros_by(const Array<T>& weights, const Bytes& bitmask, const Run& run) {
  const auto in = view(weights);
  const auto mask = view(bitmask);
  auto nonzeros = empty<T>(count_kept(mask));
  const auto out = mutable_view(nonzeros);
  {
    const py::gil_scoped_release unlocked;
    run(in, mask, out);
  }
  return nonzeros;
}

}  // namespace milpress
