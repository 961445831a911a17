// The Python module vdcore._cuda, and vdcore._cuda_emulated, which takes CPU tensors where the other one takes CUDA's.
#include "cuda/core/bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/core/launch.h"

namespace vdcore::cuda {

namespace py = pybind11;

namespace {

void begin_recording(int multiprocessors, int64_t shared_memory) {
  recording() = std::make_unique<Recording>();
  recording()->multiprocessors = multiprocessors, recording()->shared_memory = shared_memory;
}

// (kernel, blocks, threads, bytes of shared memory, blocks of a cluster, bytes of tensors) of each launch.
std::vector<std::tuple<std::string, int64_t, int, size_t, int, int64_t>> end_recording() {
  std::vector<std::tuple<std::string, int64_t, int, size_t, int, int64_t>> found;
  for (const Launched& l : recording()->launches)
    found.emplace_back(l.kernel, l.grid.blocks, l.grid.threads, l.grid.shared_bytes, l.grid.cluster, l.bytes);
  recording().reset();
  return found;
}

void define(py::module_& m) {
  m.def("why_not_device", why_not_device);
  m.def("begin_recording", begin_recording, py::arg("multiprocessors"), py::arg("shared_memory"));
  m.def("end_recording", end_recording);
  m.def("demangled", [](const std::string& name) { return demangled(name.c_str()); });
  m.def("most_shared_memory", [](int device) { return most_shared_memory({"most_shared_memory", device}); });
  define_frame_attention(m);
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
