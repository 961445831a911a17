#include "cuda/core/ptx.h"
#include "cuda/temporal_attention/temporal_attention.h"

namespace vdcore::cuda {

void temporal_attention_forward(const Where& where, DType dtype, const TemporalAttention& args) {
  if (dtype == DType::bf16) return temporal_attention_forward_of<bf16>(where, args);
  if (dtype == DType::f16) return temporal_attention_forward_of<f16>(where, args);
  launch_error(where, "float16 or bfloat16 was expected");
}

void temporal_attention_backward(const Where& where, DType dtype, const TemporalAttentionBackward& args) {
  if (dtype == DType::bf16) return temporal_attention_backward_of<bf16>(where, args);
  if (dtype == DType::f16) return temporal_attention_backward_of<f16>(where, args);
  launch_error(where, "float16 or bfloat16 was expected");
}

}  // namespace vdcore::cuda
