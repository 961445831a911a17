// Gated attention on a GPU: spatial attention whose epilogue mixes in what temporal attention left in `out`.
#pragma once

#include "cuda/core/arguments.h"
#include "cuda/core/launch.h"

namespace vdcore::cuda {

struct SpatialGated {
  Tokens q, k, v;
  Tokens out;   // contiguous; holds the temporal result, and then the mix
  Tokens kept;  // the spatial result alone, or null
  float* lse;   // of the spatial part, (B, T, S, H), or null
  Gate gate;
  const int64_t* lengths;  // (B), or null
  int64_t batch;
  int32_t frames, tokens, heads, groups, head_dim;
  float scale;
};

void spatial_gated_forward(const Where& where, DType dtype, const SpatialGated& args);

template <typename E>
void spatial_gated_forward_of(const Where& where, const SpatialGated& args);

}  // namespace vdcore::cuda
