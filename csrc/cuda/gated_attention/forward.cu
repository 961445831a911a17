#include "cuda/core/dispatch.h"
#include "cuda/gated_attention/gated_attention.h"

namespace vdcore::cuda {

void spatial_gated_forward(const Where& where, DType dtype, const SpatialGated& args) {
  with_element(where, dtype, [&](auto e) { spatial_gated_forward_of<decltype(e)>(where, args); });
}

}  // namespace vdcore::cuda
