// The Python module vdcore._cuda, and vdcore._cuda_emulated, which takes CPU tensors where the other one takes CUDA's.
#include "cuda/core/bindings.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>

#ifdef VDCORE_EMULATE
#include "emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace vdcore::cuda {

namespace py = pybind11;

namespace {

// Why no kernel can run here. Starts no context.
std::optional<std::string> missing() {
#ifndef VDCORE_EMULATE
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(status);
  for (int i = 0; i < count; ++i) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i) == cudaSuccess && major >= 8) return {};
  }
  return count ? "no CUDA device of compute capability 8.0 or newer" : "no CUDA device";
#else
  return {};
#endif
}

void define(py::module_& m) {
  m.def("missing", missing);
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
