#pragma once

#include <pybind11/pybind11.h>

namespace vdcore::cpu {

// Each adds a room's kernels to the module.
void define_adaln(pybind11::module_& m);
void define_frame_attention(pybind11::module_& m);
void define_frame_tangents(pybind11::module_& m);
void define_patchify(pybind11::module_& m);
void define_qk_norm_rope(pybind11::module_& m);
void define_temporal_attention(pybind11::module_& m);
void define_tile_attention(pybind11::module_& m);

}  // namespace vdcore::cpu
