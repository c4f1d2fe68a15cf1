#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "bindings/arrays.h"
#include "core/half.h"
#include "kernels/quantize.h"
#include "kernels/sparsify.h"

namespace milpress {

template <typename Code, typename T, typename Run>
py::tuple quantized_to(const Array<T>& weights, CodeRange range, bool fit_offset, const Run& run) {
  auto codes = empty_like<Code>(weights);
  const auto in = rows(weights);
  auto scales = empty<T>(in.n_rows);
  auto offsets = empty<Code>(fit_offset ? in.n_rows : 0);
  unlocked(run, in, range, mutable_view(scales), mutable_view(offsets), mutable_rows(codes));
  return py::make_tuple(codes, scales, fit_offset ? py::object(offsets) : py::none());
}

/// Calls `run` with codes of the sign that the range has.
template <typename T, typename Run>
py::tuple quantized(const Array<T>& weights, int code_min, int code_max, bool fit_offset,
                    const Run& run) {
  const CodeRange range{code_min, code_max};
  return code_min < 0 ? quantized_to<std::int8_t>(weights, range, fit_offset, run)
                      : quantized_to<std::uint8_t>(weights, range, fit_offset, run);
}

template <typename T, typename Run>
Bytes bitmask_of(const Array<T>& weights, const Run& run) {
  const auto in = view(weights);
  auto bitmask = empty<std::uint8_t>((in.size() + 7) / 8);
  unlocked(run, in, mutable_view(bitmask));
  return bitmask;
}

/// Defines the kernels that CPU and GPU both have: `Kernels` names either's, which have the same
/// signatures, so that one binding serves both.
template <typename Kernels, typename T>
void register_twins(py::module_& m) {
  m.def(
      "kmeans1d",
      [](const Array<T>& weights, std::size_t n_entries,
         const std::optional<Array<float>>& importance) {
        auto luts = empty<T>(rows(weights).n_rows, n_entries);
        unlocked(Kernels::kmeans1d, rows(weights), rows(importance), mutable_rows(luts));
        return luts;
      },
      exact("weights"), py::arg("n_entries"), exact("importance").none(true),
      "The optimal ascending lookup table of each row of weights.");
  m.def(
      "lut_assign",
      [](const Array<T>& weights, const Array<T>& luts) {
        auto codes = empty_like<std::uint8_t>(weights);
        unlocked(Kernels::lut_assign, rows(weights), rows(luts), mutable_rows(codes));
        return codes;
      },
      exact("weights"), exact("luts"),
      "Index of the nearest entry of the row's ascending table; ties go low.");
  m.def(
      "quantize",
      [](const Array<T>& weights, int code_min, int code_max, bool fit_offset) {
        return quantized(weights, code_min, code_max, fit_offset, Kernels::quantize);
      },
      exact("weights"), py::arg("code_min"), py::arg("code_max"), py::arg("fit_offset"),
      "(codes, scales, offsets or None), one scale and offset a row.");
  m.def(
      "quantize_mse",
      [](const Array<T>& weights, const std::optional<Array<float>>& importance, int code_min,
         int code_max, bool fit_offset) {
        return quantized(weights, code_min, code_max, fit_offset,
                         [share = rows(importance)](auto in, auto... views) {
                           Kernels::quantize_mse(in, share, views...);
                         });
      },
      exact("weights"), exact("importance").none(true), py::arg("code_min"), py::arg("code_max"),
      py::arg("fit_offset"),
      "The same with the range of each row that has the least squared error.");
  m.def(
      "keep_largest",
      [](const Array<T>& weights, std::size_t n_zeros) {
        return bitmask_of(weights,
                          [&](auto in, auto out) { Kernels::keep_largest(in, n_zeros, out); });
      },
      exact("weights"), py::arg("n_zeros"),
      "Bitmask of the weights left when the n_zeros smallest go; the earlier of equals first.");
  m.def(
      "keep_above",
      [](const Array<T>& weights, float threshold) {
        return bitmask_of(weights, [&](auto in, auto out) {
          Kernels::keep_above(in, from_float<T>(threshold), out);
        });
      },
      exact("weights"), py::arg("threshold"),
      "Bitmask of the weights whose magnitude is above the threshold.");
  m.def(
      "keep_n_m",
      [](const Array<T>& weights, std::size_t outer, std::size_t n_channels, std::size_t inner,
         std::size_t n, std::size_t m) {
        return bitmask_of(weights, [&](auto in, auto out) {
          Kernels::keep_n_m(in, ChannelShape{outer, n_channels, inner}, n, m, out);
        });
      },
      exact("weights"), py::arg("outer"), py::arg("n_channels"), py::arg("inner"), py::arg("n"),
      py::arg("m"), "Bitmask of the weights left when the n smallest of every m channels go.");
  m.def(
      "compact",
      [](const Array<T>& weights, const Bytes& bitmask) {
        auto nonzeros = empty<T>(count_kept(view(bitmask)));
        unlocked(Kernels::compact, view(weights), view(bitmask), mutable_view(nonzeros));
        return nonzeros;
      },
      exact("weights"), exact("bitmask"), "The weights whose bit is set, in order.");
}

}  // namespace milpress
