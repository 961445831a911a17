#include "cuda/core/ptx.h"
#include "cuda/gated_attention/gated_attention.h"

namespace vdcore::cuda {

void spatial_gated_forward(const Where& where, DType dtype, const SpatialGated& args) {
  if (dtype == DType::bf16) return spatial_gated_forward_of<bf16>(where, args);
  if (dtype == DType::f16) return spatial_gated_forward_of<f16>(where, args);
  launch_error(where, "float16 or bfloat16 was expected");
}

}  // namespace vdcore::cuda
