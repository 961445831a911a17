#include "cuda/core/dispatch.h"
#include "cuda/temporal_attention/temporal_attention.h"

namespace vdcore::cuda {

void temporal_attention_forward(const Where& where, DType dtype, const TemporalAttention& args) {
  with_element(where, dtype, [&](auto e) { temporal_attention_forward_of<decltype(e)>(where, args); });
}

void temporal_attention_backward(const Where& where, DType dtype, const TemporalAttentionBackward& args) {
  with_element(where, dtype, [&](auto e) { temporal_attention_backward_of<decltype(e)>(where, args); });
}

}  // namespace vdcore::cuda
