// Temporal attention on a GPU: every token attends to the same position in the frames that its frame sees.
#pragma once

#include "cuda/core/arguments.h"
#include "cuda/core/launch.h"

namespace vdcore::cuda {

struct TemporalAttention {
  Tokens q, k, v, out;  // out: contiguous
  float* lse;           // (B, T, S, H), or null
  Frames frames;
  int64_t sequences;  // B * S * H
  int64_t positions;
  int32_t heads, groups, head_dim;
  float scale;  // of the scores
  NormRope norm_rope;
};

// What the kernels hold: of up to 32 queries and keys a line all pairs at once.
constexpr int kShortFrames = 32, kMostFrames = 256, kMostChannels = 256;
constexpr bool temporal_is_short(int64_t queries, int64_t keys) {
  return queries <= kShortFrames && keys <= kShortFrames;
}
constexpr bool temporal_fits(int64_t queries, int64_t keys, int64_t channels) {
  return keys <= kMostFrames && channels <= kMostChannels && channels % 8 == 0 &&
         (temporal_is_short(queries, keys) || channels <= 128);
}

// Whether norm and RoPE are fused into the kernel: beyond, every warp of a sequence would repeat them for all keys.
constexpr bool temporal_fuses_norm_rope(int64_t queries, int64_t keys, int64_t channels) {
  return temporal_is_short(queries, keys) && channels <= 128;
}

// Of norm and RoPE, what a kernel does on its way; rms: or no norm, with or without RoPE.
enum class Fused { none, rms, layer };
constexpr int kLayerNormChunks = 4;  // no released model with temporal attention has it: one kernel for all channels

void temporal_attention_forward(const Where& where, DType dtype, const TemporalAttention& args);

template <typename E>
void temporal_attention_forward_of(const Where& where, const TemporalAttention& args);

struct TemporalAttentionBackward {
  TemporalAttention forward;  // with lse where `temporal_backward_is_short` does not hold
  Tokens dout, dq, dk, dv;
  const float* dlse;  // (B, T, S, H), or null
  float* sums;        // (blocks, 4, D): gradients of q's and k's weights, then biases, to be added up; or null
};

// Two kernels. The short one has scores and their gradients of all pairs of a warp's rows in registers at once, and,
// with norm or RoPE, the rows of 64 queries and keys in shared memory; `shared`: query heads per key head.
constexpr bool temporal_backward_is_short(int64_t frames, int64_t channels, int64_t shared) {
  return shared == 1 && channels <= 128 && frames <= kShortFrames;
}

// Whether the norm/RoPE backward is fused into the kernel: beyond, its rows and sums are too many registers.
constexpr bool temporal_backward_fuses_norm_rope(int64_t channels) { return channels <= 128; }

// The long one has a sequence's queries and keys in shared memory: tiles of 16 rows, chunks of 32 channels.
constexpr int kLongBackwardWarps = 8;
constexpr int tiles_of(int64_t frames) { return static_cast<int>((frames + 15) / 16); }
constexpr int long_backward_chunks(int64_t channels) {
  return channels <= 64 ? 2 : channels <= 96 ? 3 : channels <= 128 ? 4 : 8;
}
constexpr int long_backward_warps(int64_t queries, int64_t keys, int64_t shared) {
  const int64_t q = tiles_of(queries) * shared, k = tiles_of(keys), most = q > k ? q : k;
  return static_cast<int>(most < kLongBackwardWarps ? most : kLongBackwardWarps);
}
constexpr int64_t long_backward_shared_bytes(int64_t queries, int64_t keys, int64_t channels, int64_t shared) {
  const int64_t chunks = long_backward_chunks(channels), q = tiles_of(queries) * 16 * shared, k = tiles_of(keys) * 16;
  return (q + k) * 64 * chunks + 8 * q + long_backward_warps(queries, keys, shared) * 512 * chunks;
}

// `most`: bytes of shared memory that a block can ask for.
constexpr bool temporal_backward_fits(int64_t queries, int64_t keys, int64_t channels, int64_t shared, int64_t most) {
  const int64_t frames = queries > keys ? queries : keys;
  return temporal_fits(queries, keys, channels) && queries <= kMostFrames && shared <= 1024 &&
         (temporal_backward_is_short(frames, channels, shared) ||
          long_backward_shared_bytes(queries, keys, channels, shared) <= most);
}

// Rows of `sums`. `sequences`: B * S * H.
constexpr int64_t temporal_backward_blocks(int64_t queries, int64_t keys, int64_t channels, int64_t shared,
                                           int64_t sequences) {
  const int64_t frames = queries > keys ? queries : keys;
  if (!temporal_backward_is_short(frames, channels, shared)) return sequences / shared;
  const int64_t each = frames <= 16 ? 4 : 2;
  return (sequences + each - 1) / each;
}

void temporal_attention_backward(const Where& where, DType dtype, const TemporalAttentionBackward& args);

template <typename E>
void temporal_attention_backward_of(const Where& where, const TemporalAttentionBackward& args);

// Where `temporal_backward_is_short` does not hold.
template <typename E>
void temporal_long_backward(const Where& where, const TemporalAttentionBackward& args);

}  // namespace vdcore::cuda
