// What the module is made of; each is in its operator's room.
#pragma once

#include <pybind11/pybind11.h>

namespace vdcore::cuda {

void define_frame_attention(pybind11::module_& m);
void define_qk_norm_rope(pybind11::module_& m);
void define_temporal_attention(pybind11::module_& m);

}  // namespace vdcore::cuda
