// What operators that pass over memory once share: running their items, and when to write past the caches.
#pragma once

#include "common/threads.h"
#include "cpu/core/vec.h"

namespace vdcore::cpu::VDCORE_ISA {

constexpr int64_t kStreamBytes = 8 << 20;  // a larger result has left the caches before anybody reads it

// x is contiguous: large enough, and its rows made of whole, aligned vectors.
VDCORE_INLINE bool may_stream(const TensorView& x) {
  int64_t bytes = size_of(x.dtype);
  for (int axis = 0; axis < x.ndim; ++axis) bytes *= x.size[axis];
  return x && bytes >= kStreamBytes && x.size[x.ndim - 1] % W == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % (W * size_of(x.dtype)) == 0;
}

// Calls kernel.run<dtype>(item) for every item.
template <typename Kernel>
VDCORE_INLINE void run_items(const Kernel& kernel, DType dtype, int64_t items, int threads) {
  struct Context {
    const Kernel& kernel;
    DType dtype;
  } context{kernel, dtype};
  parallel_for(
      items, threads,
      [](void* p, int64_t item) {
        const Context& c = *static_cast<const Context*>(p);
        with_dtype(c.dtype, [&](auto type) { c.kernel.template run<decltype(type)::value>(item); });
        stream_fence();
      },
      &context);
}

}  // namespace vdcore::cpu::VDCORE_ISA
