// A tensor as every engine sees it: where it starts, what it holds, how it is laid out.
#pragma once

#include <cstdint>

// Everything in common/ is compiled once per instruction set. Forced inlining keeps a copy made for a newer one from
// being shared by the linker with code that runs on an older machine.
#ifdef __CUDACC__
#define VDCORE_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define VDCORE_INLINE inline __attribute__((always_inline))
#endif

namespace vdcore {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

VDCORE_INLINE int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Strides are in elements and 64-bit: a long video passes 2^31 elements easily. `data == nullptr` is "not given".
struct TensorView {
  static constexpr int kMaxDims = 6;
  char* data = nullptr;
  DType dtype = DType::f32;
  int32_t ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  VDCORE_INLINE explicit operator bool() const { return data != nullptr; }

  template <typename... Index>
  VDCORE_INLINE char* at(Index... index) const {
    const int64_t position[] = {static_cast<int64_t>(index)...};
    int64_t offset = 0;
    for (unsigned axis = 0; axis < sizeof...(Index); ++axis) offset += position[axis] * stride[axis];
    return data + offset * size_of(dtype);
  }
};

}  // namespace vdcore
