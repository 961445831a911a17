// Stands in for csrc/cuda in a build without nvcc.
#include "cuda/device.h"

namespace vdcore::cuda {

std::string missing() { return "vdcore was built without CUDA (no nvcc, or VDCORE_CUDA=OFF)"; }

}  // namespace vdcore::cuda
