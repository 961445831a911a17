// Arguments of the tangents of attention over whole frames (spatial, video, cross): of out and lse, from those of q, k
// and v as the scores see them.
#pragma once

#include "common/token_groups.h"
#include "cpu/core/arguments.h"

namespace vdcore::cpu {

// The video's tokens, or the text's, as in FrameSegment.
struct TangentSegment {
  TensorView q, k, v;     // (B, T, S, H, D), (B, K, R, G, D), (B, K, R, G, D)
  TensorView out, lse;    // of forward: (B, T, S, H, D), and (B, T, S, H) float32
  TensorView dq, dk, dv;  // as q, k, v, of any dtype; each optional, in both segments or in neither
  TensorView dout, dlse;  // as out and lse: what is computed
};

struct FrameTangents {
  TangentSegment segment[2];  // video, text
  const TokenGroups* groups = nullptr;
  float scale = 1;
  int threads = 1;

  const TangentSegment& of(const TokenRun& run) const { return segment[run.text]; }
};

}  // namespace vdcore::cpu
