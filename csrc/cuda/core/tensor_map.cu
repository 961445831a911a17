#include "cuda/core/tensor_map.h"

namespace vdcore::cuda {
namespace {

void check_shape(const Where& where, const MapShape& shape) {
  const auto fail = [&](const char* what) { launch_error(where, std::string("a tensor map needs ") + what); };
  if (reinterpret_cast<uintptr_t>(shape.base) % 16) fail("an address that is a multiple of 16 bytes");
  if ((shape.columns != 64 && shape.columns != 32) || shape.rows < 1 || shape.rows > 256)
    fail("a box of 64 or 32 columns and at most 256 rows");
  for (int i = 0; i < 5; ++i) {
    if (shape.size[i] < 1 || shape.size[i] > int64_t{1} << 32) fail("sizes from 1 to 2^32");
    if (i && (shape.stride[i] % 8 || shape.stride[i] < 1 || shape.stride[i] >= int64_t{1} << 39))
      fail("strides that are multiples of 16 bytes and below 2^40");
  }
}

}  // namespace

#ifdef VDCORE_EMULATE

TensorMap make_tensor_map(const Where& where, const MapShape& shape) {
  check_shape(where, shape);
  TensorMap map{shape.base, {}, {}, {shape.columns, shape.rows}};
  for (int i = 0; i < 5; ++i) map.size[i] = shape.size[i], map.stride[i] = 2 * shape.stride[i];
  return map;
}

#else

TensorMap make_tensor_map(const Where& where, const MapShape& shape) {
  check_shape(where, shape);
  if (recording()) return {};
  cuuint64_t size[5], stride[4];
  for (int i = 0; i < 5; ++i) size[i] = static_cast<cuuint64_t>(shape.size[i]);
  for (int i = 0; i < 4; ++i) stride[i] = static_cast<cuuint64_t>(shape.stride[i + 1]) * 2;
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(shape.columns), static_cast<cuuint32_t>(shape.rows), 1, 1, 1};
  const cuuint32_t every[5] = {1, 1, 1, 1, 1};
  const auto type = shape.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto swizzle = shape.columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  static const auto encode =
      reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(driver_function(where, "cuTensorMapEncodeTiled"));
  TensorMap map;
  const CUresult status =
      encode(&map, type, 5, const_cast<char*>(shape.base), size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    launch_error(where, "cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(status)));
  return map;
}

#endif

}  // namespace vdcore::cuda
