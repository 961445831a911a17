// Launching a kernel, the same way for a GPU and for the emulator. Errors are exceptions that name the operator.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef VDCORE_EMULATE
#include "emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace vdcore::cuda {

// Where a call runs: the device of its tensors and the caller's stream there, as torch names them.
struct Where {
  const char* op;
  int device = 0;
  void* stream = nullptr;
};

constexpr int64_t kMaxBlocks = 2147483647;  // of grid axis x; axes y and z end at 65,535 and are never used

[[noreturn]] inline void launch_error(const Where& where, const std::string& what) {
  throw std::runtime_error(std::string(where.op) + ": " + what);
}

#ifdef VDCORE_EMULATE

template <typename Arguments>
void launch(const Where& where, void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes,
            const Arguments& arguments) {
  try {
    emulator::run(blocks, threads, shared_bytes, [&] { kernel(arguments); }, sizeof(Arguments));
  } catch (const std::runtime_error& error) {
    launch_error(where, error.what());
  }
}

#else

// The runtime's current device, for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const Where& where) {
    check(where, cudaGetDevice(&before_));
    check(where, cudaSetDevice(where.device));
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  static void check(const Where& where, cudaError_t status) {
    if (status != cudaSuccess) launch_error(where, std::string("CUDA error: ") + cudaGetErrorString(status));
  }

 private:
  int before_ = 0;
};

// Only enqueues: no synchronisation, no allocation, so that a CUDA graph can capture it.
template <typename Arguments>
void launch(const Where& where, void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared_bytes,
            const Arguments& arguments) {
  if (blocks == 0) return;
  if (blocks > kMaxBlocks) launch_error(where, std::to_string(blocks) + " blocks, and a grid holds 2147483647");
  const OnDevice on(where);
  if (shared_bytes > 48 << 10)
    OnDevice::check(where, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                static_cast<int>(shared_bytes)));
  Arguments copy = arguments;
  void* pointers[] = {&copy};
  OnDevice::check(where, cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                          dim3(static_cast<unsigned>(threads)), pointers, shared_bytes,
                                          static_cast<cudaStream_t>(where.stream)));
}

#endif

}  // namespace vdcore::cuda
