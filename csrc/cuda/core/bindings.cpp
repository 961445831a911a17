// The Python module vdcore._cuda, and vdcore._cuda_emulated, which takes CPU tensors where the other one takes CUDA's.
#include "cuda/core/bindings.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>

#ifdef VDCORE_EMULATE
#include "emulator/emulator.h"
#else
#include "cuda/core/device.h"
#endif

namespace vdcore::cuda {

namespace py = pybind11;

namespace {

std::optional<std::string> why_missing() {
#ifdef VDCORE_EMULATE
  return std::nullopt;
#else
  const std::string reason = missing();
  return reason.empty() ? std::nullopt : std::optional(reason);
#endif
}

void define(py::module_& m) {
  m.def("missing", why_missing);
  define_frame_attention(m);
  define_gated_attention(m);
  define_qk_norm_rope(m);
  define_temporal_attention(m);
}

}  // namespace
}  // namespace vdcore::cuda

#ifdef VDCORE_EMULATE
PYBIND11_MODULE(_cuda_emulated, m, pybind11::mod_gil_not_used()) {
  m.doc() = "vdcore's CUDA kernels, run on the CPU for tests.";
  namespace emulator = vdcore::cuda::emulator;
  vdcore::cuda::define(m);
  m.def("set_order", [](const std::string& order, uint64_t seed) {
    using Order = emulator::Order;
    emulator::set_order(order == "backward" ? Order::backward
                        : order == "random" ? Order::random
                                            : Order::forward,
                        seed);
  });
  m.def("set_edges", emulator::set_edges);
}
#else
PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) {
  m.doc() = "vdcore's CUDA kernels. Use the functions of vdcore instead: they check their arguments.";
  vdcore::cuda::define(m);
}
#endif
