// Arguments of attention over whole frames (spatial, video, cross) on the CPU: query tokens of a group against the key
// tokens that the group sees. Norm and rope have been applied.
#pragma once

#include "common/token_groups.h"
#include "cpu/core/arguments.h"
#include "cpu/frame_attention/backward_plan.h"

namespace vdcore::cpu {

// The video's tokens, or the text's (then T = 1). B batch, T frames, S tokens per frame, K key frames of R tokens, H
// query heads, G key/value heads, D head channels.
struct FrameSegment {
  TensorView q, k, v;     // (B, T, S, H, D), (B, K, R, G, D), (B, K, R, G, D)
  TensorView out;         // (B, T, S, H, D)
  TensorView lse;         // (B, T, S, H) float32, optional
  TensorView dout, dlse;  // as out and lse; dlse optional
  TensorView dq, dk, dv;  // as q, k, v; dq optional, dk and dv both or neither
  TensorView spatial;     // as out, optional: the result before the gate
};

struct FrameAttention {
  FrameSegment segment[2];  // video, text
  const TokenGroups* groups = nullptr;
  float scale = 1;
  // With a gate, broadcast to (B, T, S, H, D), 0 strides included: out = gate * result + (1 - gate) * out.
  TensorView gate;
  int threads = 1;

  // Backward: dout . out - dlse of every row, (B, H, rows), the video's rows first; what the plan wants of floats; and
  // zeros: how far every tile of keys is, and whether a chain is done.
  const BackwardPlan* plan = nullptr;
  float* delta = nullptr;
  float* workspace = nullptr;
  int64_t *progress = nullptr, *done = nullptr;  // (plan->tiles,), (plan->chains,)

  const FrameSegment& of(const TokenRun& run) const { return segment[run.text]; }
};

}  // namespace vdcore::cpu
