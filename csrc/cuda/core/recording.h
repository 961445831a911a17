// What a call would launch, without a GPU: a thread that records keeps its launches in place of making them.
//
// The plans are those of the launchers themselves: which kernel, how many blocks of how many threads, how much shared
// memory. Tensors are the CPU's, and nobody looks at what they hold.
#pragma once

#include <cxxabi.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <vector>

namespace vdcore::cuda {

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  int cluster = 1;  // blocks that run side by side
};

struct Launched {
  std::string kernel;  // as C++ names it
  Grid grid;
  int64_t bytes;  // of the call's tensors, each once
};

// Of a thread, for a GPU of so many multiprocessors and bytes of shared memory a block.
struct Recording {
  int multiprocessors = 0;
  int64_t shared_memory = 0;
  std::map<const void*, int64_t> tensors;  // of the call under way
  std::vector<Launched> launches;

  void add(const std::string& kernel, const Grid& grid) {
    int64_t bytes = 0;
    for (const auto& tensor : tensors) bytes += tensor.second;
    if (grid.blocks > 0) launches.push_back({kernel, grid, bytes});
  }
};

// Null: the thread records nothing.
inline std::unique_ptr<Recording>& recording() {
  static thread_local std::unique_ptr<Recording> here;
  return here;
}

inline std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status),
                                                         std::free);
  return status == 0 && text ? text.get() : name;
}

// "...integral_constant<void (*)(A), &(void f<int>(A))>" for a kernel f<int>: what stands behind the "&", bare.
template <auto kKernel>
std::string name_of() {
  const std::string text = demangled(typeid(std::integral_constant<decltype(kKernel), kKernel>).name());
  const size_t begin = text.rfind("&(") + 2;
  return text.substr(begin, text.rfind(")>") - begin);
}

}  // namespace vdcore::cuda
