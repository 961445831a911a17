// What the operators of the CPU engine share in their arguments.
#pragma once

#include "common/frame_runs.h"
#include "common/tensor_view.h"

namespace vdcore::cpu {

enum class NormKind : int32_t { none = 0, rms = 1, layer = 2 };
enum class RopeStyle : int32_t { none = 0, interleaved = 1, half = 2 };

// Weights and biases are float32 and contiguous: (D,), or (heads * D,) with over_all. Null: not given.
struct Norm {
  NormKind kind = NormKind::none;
  bool over_all = false;  // one norm across all heads of a token
  float eps = 1e-6f;
  const float *q_weight = nullptr, *k_weight = nullptr, *q_bias = nullptr, *k_bias = nullptr;
};

// cos, sin: (F or 1, S or 1, H or 1, R / 2), unit stride last, 0 stride where the table is broadcast.
struct Rope {
  RopeStyle style = RopeStyle::none;
  TensorView cos, sin;
};

// Gradients of a norm's weights and a rope's tables. Sums over tokens go to one row per work item, which the caller
// adds up in order: same bits for any number of threads. Null: not wanted.
struct NormRopeGradients {
  int64_t items = 1;
  float *dq_weight = nullptr, *dk_weight = nullptr, *dq_bias = nullptr, *dk_bias = nullptr;  // (items, D or heads * D)
  TensorView dcos, dsin;  // (F or 1, S or 1, H or 1, R / 2) float32 and zeroed, one such table per item where S is 1
  int64_t table_item_stride = 0;
};

// Sums over tokens: one row of channels for each part of each group, a group being the tokens that share a shift and
// scale: those of a sample, or of a frame. The caller adds them up in order: same bits for any number of threads.
struct GroupSums {
  bool per_frame = false;
  int64_t parts = 1;  // of a group
};

}  // namespace vdcore::cpu
