// The instructions that kernels are written in: thin functions with one meaning and two bodies, inline PTX under nvcc
// and an emulation of what the PTX ISA documents under VDCORE_EMULATE (see emulator.h). Kernels contain no other
// intrinsics.
//
// Names: E is the element, f16 or bf16; 32-bit registers hold two of them, the lower index in the lower half. A lane is
// 4 * row + column of a fragment: mma's rows are lane / 4 and lane / 4 + 8, its columns 2 * (lane % 4) and the next.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/tensor_view.h"

namespace vdcore::cuda {

struct f16 {
  static constexpr DType dtype = DType::f16;
};
struct bf16 {
  static constexpr DType dtype = DType::bf16;
};

struct alignas(16) Vec4 {
  uint32_t x[4];
};
struct alignas(8) Vec2 {
  uint32_t x[2];
};
struct Float2 {
  float lo, hi;
};

}  // namespace vdcore::cuda

#ifdef VDCORE_EMULATE
#define VDCORE_DEVICE inline
#define VDCORE_KERNEL(threads, blocks_per_sm) static void
#define VDCORE_UNROLL
#define VDCORE_UNROLL_BY(n)
#define VDCORE_NO_UNROLL
#include "emulator/ptx_emulated.h"
#else
#define VDCORE_DEVICE __device__ __forceinline__
#define VDCORE_KERNEL(threads, blocks_per_sm) static __global__ void __launch_bounds__(threads, blocks_per_sm)
#define VDCORE_PRAGMA(x) _Pragma(#x)
#define VDCORE_UNROLL _Pragma("unroll")
#define VDCORE_UNROLL_BY(n) VDCORE_PRAGMA(unroll(n))
#define VDCORE_NO_UNROLL _Pragma("unroll 1")
#include "cuda/core/ptx_device.h"
#endif

namespace vdcore::cuda {

// f(i, j, ...) for all indices below these sizes, the last one fastest, unrolled.
template <int N, int... kInner, typename F>
VDCORE_DEVICE void unroll(F f) {
  VDCORE_UNROLL
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof...(kInner) == 0)
      f(i);
    else
      unroll<kInner...>([&](auto... inner) { f(i, inner...); });
  }
}

}  // namespace vdcore::cuda
