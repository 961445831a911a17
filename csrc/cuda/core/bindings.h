#pragma once

#include <pybind11/pybind11.h>

namespace vdcore::cuda {

void define_frame_attention(pybind11::module_& m);

}  // namespace vdcore::cuda
