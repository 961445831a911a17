#include "cuda/core/launch.h"

#ifndef VDCORE_EMULATE

#include <cuda.h>

#include <map>
#include <mutex>
#include <utility>

namespace vdcore::cuda {
namespace {

void check(const Where& where, cudaError_t status) {
  if (status != cudaSuccess) launch_error(where, std::string("CUDA error: ") + cudaGetErrorString(status));
}

int attribute(const Where& where, cudaDeviceAttr which) {
  int value = 0;
  check(where, cudaDeviceGetAttribute(&value, which, where.device));
  return value;
}

// The runtime's current device, for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const Where& where) {
    check(where, cudaGetDevice(&before_));
    moved_ = before_ != where.device;
    // To come back to a device that nobody has used would make a context there, of some 500 MB.
    comes_back_ = moved_ && has_context(where, before_);
    if (moved_) check(where, cudaSetDevice(where.device));
  }
  ~OnDevice() {
    if (comes_back_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  static bool has_context(const Where& where, int device) {
    static const auto state =
        reinterpret_cast<decltype(&cuDevicePrimaryCtxGetState)>(driver_function(where, "cuDevicePrimaryCtxGetState"));
    unsigned flags = 0;
    int active = 0;
    return state(device, &flags, &active) == CUDA_SUCCESS && active;
  }

  int before_ = 0;
  bool moved_ = false, comes_back_ = false;
};

// Asks once for what is above 48 KiB.
void allow_shared_memory(const Where& where, const void* kernel, size_t bytes) {
  if (bytes <= 48 << 10) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, where.device}];
  if (bytes <= most) return;
  check(where, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  most = bytes;
}

}  // namespace

void* driver_function(const Where& where, const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  check(where, cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status));
#else
  check(where, cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status));
#endif
  if (status != cudaDriverEntryPointSuccess || !found)
    launch_error(where, std::string("the driver has no ") + name + " (CUDA 12.0 or newer is needed)");
  return found;
}

int multiprocessors(const Where& where) {
  return recording() ? recording()->multiprocessors : attribute(where, cudaDevAttrMultiProcessorCount);
}

int64_t most_shared_memory(const Where& where) {
  return recording() ? recording()->shared_memory : attribute(where, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

std::optional<std::string> why_not_device(int device) {
  int major = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(status);
  if (major < 8) return "it is for GPUs of compute capability 8.0 or newer";
  return {};
}

void launch_kernel(const Where& where, const void* kernel, const Grid& grid, void* arguments) {
  if (grid.blocks == 0) return;
  if (grid.blocks > kMaxBlocks)
    launch_error(where, std::to_string(grid.blocks) + " blocks, and a grid holds 2147483647");
  const OnDevice on(where);
  allow_shared_memory(where, kernel, grid.shared_bytes);
  void* pointers[] = {arguments};
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  how.blockDim = dim3(static_cast<unsigned>(grid.threads));
  how.dynamicSmemBytes = grid.shared_bytes;
  how.stream = static_cast<cudaStream_t>(where.stream);
  how.attrs = &cluster;
  how.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(where, cudaLaunchKernelExC(&how, kernel, pointers));
}

}  // namespace vdcore::cuda

#endif
