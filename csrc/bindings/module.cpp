#include "bindings/register.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled core of milpress: kernels on NumPy arrays, and the blob storage.";
  milpress::register_kernels(m);
  milpress::register_blob(m);
  milpress::register_metal(
      m.def_submodule("metal", "The kernels that a GPU runs, as named above."));
}
