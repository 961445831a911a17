// Spatial and video attention on sm_90a, forward. Norm and RoPE have been applied.
#pragma once

#include <string>

#include "common/tensor_view.h"
#include "cuda/core/arguments.h"
#include "cuda/core/launch.h"

namespace vdcore::cuda {

// The video's tokens, or the text's (then T = K = 1). B batch, T frames, S tokens per frame, K key frames, H query
// heads, G key/value heads, D head channels.
struct FrameTokens {
  TensorView q, k, v;  // (B, T, S, H, D), (B, K, S, G, D), (B, K, S, G, D)
};

struct FrameAttention {
  FrameTokens video, text;              // text may be missing
  TensorView out;                       // (B, N, H, D), contiguous: the N = T S + L rows of the video and of the text
  TensorView lse;                       // (B, N, H) float32, contiguous, optional
  Gate gate{};                          // optional: out = gate * result + (1 - gate) * out
  TensorView ungated;                   // where the result itself goes, optional, as out
  int64_t video_row = 0, text_row = 0;  // where they begin in out
  WindowMask mask;
  int64_t q_start = 0;
  const int64_t* lengths = nullptr;       // (B,) valid frames, on the device, optional
  const int64_t* text_lengths = nullptr;  // (B,) valid text tokens
  bool text_sees_video = true;
  float exponent = 1;  // scale of the scores times log2 e, above 0
};

// Why the tensors cannot be served, by their sizes and strides; empty if they can.
std::string why_not_frame_attention_sm90(const FrameAttention& call);

void frame_attention_sm90_forward(const Where& where, const FrameAttention& call);

}  // namespace vdcore::cuda
