// Arguments of QK-norm and rope as an operator of its own. Shapes: B batch, T frames, S tokens per frame, H query
// heads, G key heads, D head channels.
#pragma once

#include "cpu/arguments.h"

namespace vdcore::cpu {

struct QKNormRope {
  TensorView q, k;          // (B, T, S, H, D), (B, T, S, G, D), of one dtype
  TensorView q_out, k_out;  // as q and k, contiguous
  int64_t frame_start = 0;  // row of the rope table for frame 0
  Norm norm;
  Rope rope;
  int threads = 1;
};

struct QKNormRopeBackward {
  QKNormRope forward;         // without q_out, k_out
  TensorView dq_out, dk_out;  // as q and k; not given: that side is left out
  TensorView dq, dk;          // as q and k, contiguous
  // Sums over tokens go to one row per work item, which the caller adds up in order: same bits for any number of
  // threads. Null: not wanted.
  int64_t items = 1;
  float *dq_weight = nullptr, *dk_weight = nullptr, *dq_bias = nullptr, *dk_bias = nullptr;  // (items, D or heads * D)
  TensorView dcos, dsin;  // (F or 1, S or 1, H or 1, R / 2) float32 and zeroed, one such table per item where S is 1
  int64_t table_item_stride = 0;
};

}  // namespace vdcore::cpu
