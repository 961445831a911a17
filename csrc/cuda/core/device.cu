#include <cuda_runtime.h>

#include "cuda/core/device.h"

namespace vdcore::cuda {

std::string missing() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(status);
  for (int i = 0; i < count; ++i) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i) == cudaSuccess && major >= 8) return "";
  }
  return count ? "no CUDA device of compute capability 8.0 or newer" : "no CUDA device";
}

}  // namespace vdcore::cuda
