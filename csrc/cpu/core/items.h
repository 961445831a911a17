// What operators that pass over memory once share: running their items, and when to write past the caches.
#pragma once

#include "common/threads.h"
#include "cpu/core/vec.h"

namespace vdcore::cpu::VDCORE_ISA {

// Whether a result is written past the caches, which it would have left before anybody reads it. Its rows must lie on
// whole vectors.
VDCORE_INLINE bool streams(const TensorView& x) {
  constexpr int64_t kStreamBytes = 8 << 20;
  if (!x) return false;
  int64_t bytes = size_of(x.dtype);
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % (W * bytes) == 0 && x.size[x.ndim - 1] % W == 0;
  for (int axis = 0; axis < x.ndim; ++axis) {
    bytes *= x.size[axis];
    if (axis < x.ndim - 1) aligned = aligned && (x.size[axis] == 1 || x.stride[axis] % W == 0);
  }
  return aligned && bytes >= kStreamBytes;
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
