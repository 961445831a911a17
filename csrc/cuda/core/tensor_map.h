// Tensor maps: what the tensor memory accelerator knows of a tensor.
#pragma once

#include "cuda/core/launch.h"
#include "cuda/core/ptx_sm90.h"

namespace vdcore::cuda {

// Five dimensions of 16-bit elements, innermost first; strides in elements, the first one 1. Boxes are `columns` (64 or
// 32) x `rows` of the first two and go to shared memory with a swizzle of 128 or 64 bytes, a row of the box; what lies
// outside is 0. The base must be memory of the tensor, whatever is loaded: hardware looks at it.
struct MapShape {
  DType dtype;
  const char* base;
  int64_t size[5], stride[5];
  int32_t columns, rows;
};

TensorMap make_tensor_map(const Where& where, const MapShape& shape);

}  // namespace vdcore::cuda
