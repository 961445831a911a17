// Temporal attention on a GPU: every token attends to the same position in the frames that its frame sees.
#pragma once

#include "cuda/arguments.h"
#include "cuda/launch.h"

namespace vdcore::cuda {

struct TemporalAttention {
  Tokens q, k, v, out;  // out: contiguous
  float* lse;           // (B, T, S, H), or null
  Frames frames;
  int64_t lines;  // B * S * H
  int64_t positions;
  int32_t heads, groups, head_dim;
  float scale;  // of the scores
  NormRope moved;
};

// What kernels are there for.
constexpr int kMostFrames = 256, kMostChannels = 256;
constexpr bool temporal_fits(int64_t keys, int64_t channels) {
  return keys <= kMostFrames && channels <= kMostChannels && channels % 8 == 0 && (keys <= 32 || channels <= 128);
}

// Whether norm and rope happen on the way: beyond, every warp of a line would repeat them for all keys.
constexpr bool temporal_moves(int64_t keys, int64_t channels) { return keys <= 32 && channels <= 128; }

void temporal_attention_forward(const Where& where, DType dtype, const TemporalAttention& args);

template <typename E>
void temporal_attention_forward_of(const Where& where, const TemporalAttention& args);

struct TemporalAttentionBackward {
  TemporalAttention forward;  // out and lse are not used; heads == groups, no norm, no rope
  Tokens dout, dq, dk, dv;
  const float* dlse;  // (B, T, S, H), or null
};

// Scores and their gradients of all pairs of a warp's rows are in registers at once.
constexpr bool temporal_backward_fits(int64_t frames, int64_t channels) {
  return channels % 8 == 0 && channels <= (frames <= 64 ? 128 : frames <= 128 ? 64 : 0);
}

void temporal_attention_backward(const Where& where, DType dtype, const TemporalAttentionBackward& args);

template <typename E>
void temporal_attention_backward_of(const Where& where, const TemporalAttentionBackward& args);

}  // namespace vdcore::cuda
