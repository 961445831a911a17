// Arguments of temporal attention on the CPU. Shapes: B batch, T frames, K key frames, S tokens per frame, H query
// heads, G key/value heads, D head channels.
#pragma once

#include "cpu/core/arguments.h"

namespace vdcore::cpu {

// What each query frame sees, for every sample: the key frames [begin, end) and, before them, [low_begin, low_end).
// Where `lengths` are equal (or not given) one row serves the whole batch.
struct VisibleFrames {
  const int32_t *begin = nullptr, *end = nullptr, *low_begin = nullptr, *low_end = nullptr;  // (B or 1, T)
  // (B or 1, K): query frames that see a key frame; where there are two runs of them, also_begin and also_end
  const int32_t *seen_begin = nullptr, *seen_end = nullptr, *also_begin = nullptr, *also_end = nullptr;
  bool per_sample = false;
  bool dense = false;  // everybody sees everything
  bool twice = false;  // there are two runs
};

struct TemporalAttention {
  TensorView q, k, v;  // (B, T, S, H, D), (B, K, S, G, D), (B, K, S, G, D)
  TensorView out;      // (B, T, S, H, D)
  TensorView lse;      // (B, T, S, H) float32, optional
  VisibleFrames visible;
  int64_t q_start = 0;
  float scale = 1;
  // Added to scores: (bias_heads, K, bias_row), in base 2; bias_heads is 1 or H, bias_row at least T and whole vectors.
  const float* bias = nullptr;
  int64_t bias_heads = 1, bias_row = 0;
  Norm norm;
  Rope rope;
  int threads = 1;
};

struct TemporalAttentionBackward : NormRopeGradients {
  TemporalAttention forward;  // q, k, v, out, lse as forward left them
  TensorView dout;            // as out
  TensorView dlse;            // as lse, optional
  TensorView dq, dk, dv;      // as q, k, v; each optional
  float* dbias = nullptr;     // (items, as bias), zeroed; optional. Of the bias itself, not in base 2
};

}  // namespace vdcore::cpu
