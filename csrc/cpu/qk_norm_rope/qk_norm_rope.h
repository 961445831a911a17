// Arguments of QK-norm and rope as an operator of its own. Shapes: B batch, T frames, S tokens per frame, H query
// heads, G key heads, D head channels.
#pragma once

#include "cpu/core/arguments.h"

namespace vdcore::cpu {

struct QKNormRope {
  TensorView q, k;          // (B, T, S, H, D), (B, T, S, G, D), of one dtype
  TensorView q_out, k_out;  // as q and k, contiguous
  int64_t frame_start = 0;  // row of the rope table for frame 0
  Norm norm;
  Rope rope;
  int threads = 1;
};

struct QKNormRopeBackward : NormRopeGradients {
  QKNormRope forward;         // without q_out, k_out
  TensorView dq_out, dk_out;  // as q and k; not given: that side is left out
  TensorView dq, dk;          // as q and k, contiguous
};

}  // namespace vdcore::cpu
