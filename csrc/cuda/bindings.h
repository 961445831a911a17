#pragma once

#include <pybind11/pybind11.h>

namespace vdcore::cuda {

// Adds to the module what CUDA has: cuda_missing(), the reason why no kernel can run here or None, and, if there are
// any, the kernels.
void define(pybind11::module_& m);

}  // namespace vdcore::cuda
