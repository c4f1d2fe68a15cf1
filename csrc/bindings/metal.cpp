#include <pybind11/stl.h>

#include <cstdint>
#include <optional>

#include "bindings/calls.h"
#include "bindings/register.h"
#include "kernels/sparsify.h"
#include "metal/kernels.h"

// The GPU twins, each as bindings/kernels.cpp has its original.
namespace milpress {
namespace {

template <typename T>
Array<T> kmeans1d(const Array<T>& weights, std::size_t n_entries,
                  const std::optional<Array<float>>& importance) {
  return luts_by(weights, n_entries, importance, [](auto... views) { metal::kmeans1d(views...); });
}

template <typename T>
Bytes lut_assign(const Array<T>& weights, const Array<T>& luts) {
  return codes_by(weights, luts, [](auto... views) { metal::lut_assign(views...); });
}

template <typename T>
py::tuple quantize(const Array<T>& weights, int code_min, int code_max, bool fit_offset) {
  return quantized_by(weights, code_min, code_max, fit_offset,
                      [](auto... views) { metal::quantize(views...); });
}

template <typename T>
py::tuple quantize_mse(const Array<T>& weights, int code_min, int code_max, bool fit_offset) {
  return quantized_by(weights, code_min, code_max, fit_offset,
                      [](auto... views) { metal::quantize_mse(views...); });
}

template <typename T>
Bytes keep_largest(const Array<T>& weights, std::size_t n_zeros) {
  return bitmask_by(weights, [&](auto in, auto out) { metal::keep_largest(in, n_zeros, out); });
}

template <typename T>
Bytes keep_above(const Array<T>& weights, float threshold) {
  return bitmask_by(
      weights, [&](auto in, auto out) { metal::keep_above(in, from_float<T>(threshold), out); });
}

template <typename T>
Bytes keep_n_m(const Array<T>& weights, std::size_t outer, std::size_t n_channels,
               std::size_t inner, std::size_t n, std::size_t m) {
  return bitmask_by(weights, [&](auto in, auto out) {
    metal::keep_n_m(in, {outer, n_channels, inner}, n, m, out);
  });
}

template <typename T>
Array<T> compact(const Array<T>& weights, const Bytes& bitmask) {
  return nonzeros_by(weights, bitmask, [](auto... views) { metal::compact(views...); });
}

template <typename T>
void register_for(py::module_& m) {
  m.def("metal_kmeans1d", &kmeans1d<T>, py::arg("weights").noconvert(), py::arg("n_entries"),
        py::arg("importance").noconvert().none(true), "kmeans1d on the GPU.");
  m.def("metal_lut_assign", &lut_assign<T>, py::arg("weights").noconvert(),
        py::arg("luts").noconvert(), "lut_assign on the GPU.");
  m.def("metal_quantize", &quantize<T>, py::arg("weights").noconvert(), py::arg("code_min"),
        py::arg("code_max"), py::arg("fit_offset"), "quantize on the GPU.");
  m.def("metal_quantize_mse", &quantize_mse<T>, py::arg("weights").noconvert(), py::arg("code_min"),
        py::arg("code_max"), py::arg("fit_offset"), "quantize_mse on the GPU.");
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
