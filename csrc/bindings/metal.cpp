#include "bindings/register.h"
#include "bindings/twins.h"
#include "metal/kernels.h"

namespace milpress {
namespace {

struct OnGpu {
  static constexpr auto kmeans1d = [](auto... views) { metal::kmeans1d(views...); };
  static constexpr auto lut_assign = [](auto... views) { metal::lut_assign(views...); };
  static constexpr auto quantize = [](auto... views) { metal::quantize(views...); };
  static constexpr auto quantize_mse = [](auto... views) { metal::quantize_mse(views...); };
  static constexpr auto keep_largest = [](auto... views) { metal::keep_largest(views...); };
  static constexpr auto keep_above = [](auto... views) { metal::keep_above(views...); };
  static constexpr auto keep_n_m = [](auto... views) { metal::keep_n_m(views...); };
  static constexpr auto compact = [](auto... views) { metal::compact(views...); };
};

}  // namespace

void register_metal(py::module_ m) {
  py::register_exception<metal::DeviceError>(m, "DeviceError", PyExc_RuntimeError);
  m.def(
      "device",
      [] {
        const metal::Device gpu = metal::device();
        return py::make_tuple(gpu.name, gpu.reason);
      },
      "(name of the GPU, why it can't be used); each may be empty.");
  m.def("self_test", &metal::self_test, py::call_guard<py::gil_scoped_release>(),
        "Which known answer the GPU got wrong; empty if none.");
  register_twins<OnGpu, Half>(m);
  register_twins<OnGpu, float>(m);
}

}  // namespace milpress
