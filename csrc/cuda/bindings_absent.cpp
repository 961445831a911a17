// Stands in for csrc/cuda in a build without nvcc.
#include "cuda/bindings.h"

namespace vdcore::cuda {

void define(pybind11::module_& m) {
  m.def("cuda_missing", [] { return "vdcore was built without CUDA (no nvcc, or VDCORE_CUDA=OFF)"; });
}

}  // namespace vdcore::cuda
