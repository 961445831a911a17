// The Python module vdcore._native, the CPU engine: tensors come as DLPack capsules and go to the engine as TensorView.
// Arguments have been checked in Python; what is checked here is what would corrupt memory.
#include "cpu/core/bindings.h"

#include <optional>
#include <string>

#include "common/threads.h"
#include "cpu/core/engine.h"

namespace py = pybind11;
using namespace vdcore;

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "vdcore's CPU kernels. Use the functions of vdcore instead: they check their arguments.";
  m.def("cpu_isa", [] { return cpu::kernels().isa; });
  // For tests: products of emulated tiles that this thread has run, -1 where tiles are real, None where there are none.
  m.def("tile_products", []() -> std::optional<int64_t> {
    const auto count = cpu::kernels().tile_products;
    return count ? std::optional(count()) : std::nullopt;
  });
  m.def("share_openmp", [](const std::string& path) { return share_openmp(path.c_str()); });
  cpu::define_adaln(m);
  cpu::define_frame_attention(m);
  cpu::define_frame_tangents(m);
  cpu::define_patchify(m);
  cpu::define_qk_norm_rope(m);
  cpu::define_temporal_attention(m);
  cpu::define_tile_attention(m);
}
