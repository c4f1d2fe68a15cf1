#include <pybind11/stl.h>

#include <cstdint>
#include <optional>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "kernels/sparsify.h"
#include "metal/kernels.h"

// The GPU twins, each as bindings/kernels.cpp has its original.
namespace milpress {
namespace {

using Bytes = Array<std::uint8_t>;

template <typename T>
Array<T> kmeans1d(const Array<T>& weights, std::size_t n_entries,
                  const std::optional<Array<float>>& importance) {
  const auto in = rows(weights);
  const auto weight_of = importance ? rows(*importance) : MatrixView<const float>{};
  auto luts = empty<T>(in.n_rows, n_entries);
  const auto out = mutable_rows(luts);
  {
    const py::gil_scoped_release unlocked;
    metal::kmeans1d(in, weight_of, out);
  }
  return luts;
}

template <typename T>
Bytes lut_assign(const Array<T>& weights, const Array<T>& luts) {
  const auto in = rows(weights);
  const auto entries = rows(luts);
  auto codes = empty<std::uint8_t>(in.n_rows, in.n_cols);
  const auto out = mutable_rows(codes);
  {
    const py::gil_scoped_release unlocked;
    metal::lut_assign(in, entries, out);
  }
  return codes;
}

template <bool kSearch, typename T, typename Code>
py::tuple quantize_to(const Array<T>& weights, CodeRange range, bool fit_offset) {
  const auto in = rows(weights);
  auto codes = empty<Code>(in.n_rows, in.n_cols);
  auto scales = empty<T>(in.n_rows);
  auto offsets = empty<Code>(fit_offset ? in.n_rows : 0);
  const auto out = mutable_rows(codes);
  const auto scale_of = mutable_view(scales);
  const auto offset_of = mutable_view(offsets);
  {
    const py::gil_scoped_release unlocked;
    if constexpr (kSearch) {
      metal::quantize_mse(in, range, scale_of, offset_of, out);
    } else {
      metal::quantize(in, range, scale_of, offset_of, out);
    }
  }
  return py::make_tuple(codes, scales, fit_offset ? py::object(offsets) : py::none());
}

template <bool kSearch, typename T>
py::tuple quantize(const Array<T>& weights, int code_min, int code_max, bool fit_offset) {
  const CodeRange range{code_min, code_max};
  return code_min < 0 ? quantize_to<kSearch, T, std::int8_t>(weights, range, fit_offset)
                      : quantize_to<kSearch, T, std::uint8_t>(weights, range, fit_offset);
}

// Lets `write` fill a bitmask for the weights.
template <typename T, typename Write>
Bytes bitmask_of(const Array<T>& weights, const Write& write) {
  const auto in = view(weights);
  auto bitmask = empty<std::uint8_t>((in.size() + 7) / 8);
  const auto out = mutable_view(bitmask);
  {
    const py::gil_scoped_release unlocked;
    write(in, out);
  }
  return bitmask;
}

template <typename T>
Bytes keep_largest(const Array<T>& weights, std::size_t n_zeros) {
  return bitmask_of(weights, [&](std::span<const T> in, std::span<std::uint8_t> out) {
    metal::keep_largest(in, n_zeros, out);
  });
}

template <typename T>
Bytes keep_above(const Array<T>& weights, float threshold) {
  return bitmask_of(weights, [&](std::span<const T> in, std::span<std::uint8_t> out) {
    metal::keep_above(in, from_float<T>(threshold), out);
  });
}

template <typename T>
Bytes keep_n_m(const Array<T>& weights, std::size_t outer, std::size_t n_channels,
               std::size_t inner, std::size_t n, std::size_t m) {
  return bitmask_of(weights, [&](std::span<const T> in, std::span<std::uint8_t> out) {
    metal::keep_n_m(in, {outer, n_channels, inner}, n, m, out);
  });
}

template <typename T>
Array<T> compact(const Array<T>& weights, const Bytes& bitmask) {
  const auto in = view(weights);
  const auto mask = view(bitmask);
  auto nonzeros = empty<T>(count_kept(mask));
  const auto out = mutable_view(nonzeros);
  {
    const py::gil_scoped_release unlocked;
    metal::compact(in, mask, out);
  }
  return nonzeros;
}

template <typename T>
void register_for(py::module_& m) {
  m.def("metal_kmeans1d", &kmeans1d<T>, py::arg("weights").noconvert(), py::arg("n_entries"),
        py::arg("importance").noconvert().none(true), "kmeans1d on the GPU.");
  m.def("metal_lut_assign", &lut_assign<T>, py::arg("weights").noconvert(),
        py::arg("luts").noconvert(), "lut_assign on the GPU.");
  m.def("metal_quantize", &quantize<false, T>, py::arg("weights").noconvert(), py::arg("code_min"),
        py::arg("code_max"), py::arg("fit_offset"), "quantize on the GPU.");
  m.def("metal_quantize_mse", &quantize<true, T>, py::arg("weights").noconvert(),
        py::arg("code_min"), py::arg("code_max"), py::arg("fit_offset"),
        "quantize_mse on the GPU.");
  m.def("metal_keep_largest", &keep_largest<T>, py::arg("weights").noconvert(), py::arg("n_zeros"),
        "keep_largest on the GPU.");
  m.def("metal_keep_above", &keep_above<T>, py::arg("weights").noconvert(), py::arg("threshold"),
        "keep_above on the GPU.");
  m.def("metal_keep_n_m", &keep_n_m<T>, py::arg("weights").noconvert(), py::arg("outer"),
        py::arg("n_channels"), py::arg("inner"), py::arg("n"), py::arg("m"),
        "keep_n_m on the GPU.");
  m.def("metal_compact", &compact<T>, py::arg("weights").noconvert(),
        py::arg("bitmask").noconvert(), "compact on the GPU.");
}

py::tuple device() {
  const metal::Device found = metal::device();
  return py::make_tuple(found.name, found.reason);
}

std::string self_test() {
  const py::gil_scoped_release unlocked;
  return metal::self_test();
}

}  // namespace

void register_metal(py::module_& m) {
  py::register_exception<metal::DeviceError>(m, "DeviceError", PyExc_RuntimeError);
  m.def("metal_device", &device, "(name of the GPU, why it can't be used); each may be empty.");
  m.def("metal_self_test", &self_test, "Which known answer the GPU got wrong; empty if none.");
  register_for<Half>(m);
  register_for<float>(m);
}

}  // namespace milpress
