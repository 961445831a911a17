#pragma once

#include <pybind11/pybind11.h>

namespace vdcore::cpu {

// Add to the module the CPU kernels: attention, and the operators that work on rows of channels.
void define_attention(pybind11::module_& m);
void define_rows(pybind11::module_& m);

}  // namespace vdcore::cpu
