// Arguments of adaptive layer norm on the CPU. Shapes: B batch, T frames, S tokens per frame, C channels. A tensor "per
// sample", "per frame" or "per token" is (B, 1, 1, C), (B, T, 1, C) or (B, T, S, C), with stride 0 where it is
// broadcast, in a dtype of its own.
#pragma once

#include "cpu/core/arguments.h"

namespace vdcore::cpu {

struct Modulate {
  TensorView x;                                    // (B, T, S, C)
  TensorView y;                                    // as x, contiguous
  TensorView shift, scale;                         // per sample, frame or token
  const float *weight = nullptr, *bias = nullptr;  // (C,)
  NormKind kind = NormKind::layer;
  float eps = 1e-6f;
  int threads = 1;
};

struct ModulateBackward {
  Modulate forward;   // without y
  TensorView dy;      // as x
  TensorView dx;      // as x, contiguous; optional
  TensorView dscale;  // (B, T, S, C), contiguous; optional, where scale is per token
  GroupSums sums;
  // (B, T or 1, parts, C), each optional: sums of dy, of dz and of dz * normed x. dz is dy where scale is shared by a
  // group, dy * (1 + scale) where it is per token.
  bool scale_per_token = false;
  float *sum_dy = nullptr, *sum_dz = nullptr, *sum_dz_x = nullptr;
};

struct GateResidual {
  TensorView residual, x;  // (B, T, S, C)
  TensorView gate;         // per sample, frame or token
  TensorView y;            // as x, contiguous
  int threads = 1;
};

struct GateResidualBackward {
  TensorView x, gate, dy;  // as above
  TensorView dx;           // as x, contiguous; optional
  TensorView dgate;        // (B, T, S, C), contiguous; optional, where gate is per token
  GroupSums sums;
  float* sum_dy_x = nullptr;  // (B, T or 1, parts, C), optional
  int threads = 1;
};

}  // namespace vdcore::cpu
