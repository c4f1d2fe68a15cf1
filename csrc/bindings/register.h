#pragma once

#include <pybind11/pybind11.h>

namespace milpress {

void register_blob(pybind11::module_& m);
void register_kernels(pybind11::module_& m);
void register_metal(pybind11::module_ m);

}  // namespace milpress
