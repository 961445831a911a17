// Launching a kernel, the same way for a GPU and for the emulator. Errors are exceptions that name the operator.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/core/recording.h"
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

inline int multiprocessors(const Where&) {
  return recording() ? recording()->multiprocessors : 3;  // few, so that a block has several tiles
}
inline int64_t most_shared_memory(const Where&) { return recording() ? recording()->shared_memory : 227 << 10; }
inline std::optional<std::string> why_not_device(int) { return {}; }

template <typename Arguments>
void launch(const Where& where, void (*kernel)(Arguments), const Grid& grid, const Arguments& arguments) {
  try {
    emulator::run(
        grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(arguments); }, sizeof(Arguments), grid.cluster);
  } catch (const std::runtime_error& error) {
    launch_error(where, error.what());
  }
}

#else

// Of the driver, found at run time: nothing links to it, so that the module loads without one.
void* driver_function(const Where& where, const char* name);

int multiprocessors(const Where& where);
int64_t most_shared_memory(const Where& where);  // bytes a block can ask for

// Why no kernel can run on a device.
std::optional<std::string> why_not_device(int device);

// Only enqueues: no synchronisation, no allocation, so that a CUDA graph can capture it.
void launch_kernel(const Where& where, const void* kernel, const Grid& grid, void* arguments);

template <typename Arguments>
void launch(const Where& where, void (*kernel)(Arguments), const Grid& grid, const Arguments& arguments) {
  Arguments copy = arguments;
  launch_kernel(where, reinterpret_cast<const void*>(kernel), grid, &copy);
}

#endif

template <auto kKernel, typename Arguments>
void launch(const Where& where, const Grid& grid, const Arguments& arguments) {
  if (recording()) return recording()->add(name_of<kKernel>(), grid);
  launch(where, kKernel, grid, arguments);
}

}  // namespace vdcore::cuda
