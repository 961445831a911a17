// How temporal attention's problem is cut up, and how its rows come into tiles: shared by forward and backward.
//
// One step is one position of one sample and a few heads. All its rows are gathered into a stage in scratch memory,
// frame by frame, so that neighbouring heads are read in one go: rows of one head alone are too short for the memory
// system, and rows of different frames often lie a multiple of 4096 bytes apart, where they evict one another from L1
// and L2. While a step computes, it prefetches the rows of the next one.
#pragma once

#include "cpu/core/arena.h"
#include "cpu/core/items.h"
#include "cpu/core/softmax.h"
#include "cpu/qk_norm_rope/norm_rope.h"
#include "cpu/temporal_attention/temporal_attention.h"

namespace vdcore::cpu::VDCORE_ISA {

struct Shape {
  int64_t B, T, K, S, H, G, D;
  int64_t row;    // D padded to whole vectors
  int64_t group;  // query heads that share a key/value head

  explicit Shape(const TemporalAttention& a)
      : B(a.q.size[0]),
        T(a.q.size[1]),
        K(a.k.size[1]),
        S(a.q.size[2]),
        H(a.q.size[3]),
        G(a.k.size[3]),
        D(a.q.size[4]),
        row(round_up(D)),
        group(H / G) {}

  // The largest number of whole head groups below `from` heads that divides H, in heads; one group at least.
  int64_t fewer_heads(int64_t from) const {
    for (int64_t n = from - group; n > group; n -= group)
      if (H % n == 0) return n;
    return group;
  }
};

inline bool transformed(const TemporalAttention& a) {
  return a.norm.kind != NormKind::none || a.rope.style != RopeStyle::none;
}

// Rows of several heads over a block of frames: (head, frame, channel).
struct Stage {
  float* data;
  int64_t frames, row;
  Tile head(int64_t h) const { return {data + h * frames * row, row}; }
};

struct HeadRange {
  int64_t first, count;
};

// What a step works on: one position of one sample, and some of its heads.
struct Place {
  int64_t b, s;
  HeadRange heads;  // query heads

  HeadRange kv_heads(int64_t group) const { return {heads.first / group, heads.count / group}; }
  // Rows of one head from frame t on, where they lie.
  Tile rows(const TensorView& x, int64_t t, int64_t head) const {
    return {reinterpret_cast<float*>(x.at(b, t, s, head)), x.stride[1]};
  }
};

// Stage rows [0, frames.size()) = rows of x in `frames`.
template <DType T>
void gather_rows(const TensorView& x, int64_t b, int64_t s, Run frames, HeadRange heads, int64_t channels, Stage stage,
                 int64_t offset) {
  const int64_t head_bytes = x.stride[3] * size_of(T);
  for (int64_t t = frames.begin; t < frames.end; ++t) {
    const char* in = x.at(b, t, s, heads.first);
    float* out = stage.data + (t - frames.begin + offset) * stage.row;
    for (int64_t h = 0; h < heads.count; ++h, in += head_bytes, out += stage.frames * stage.row)
      read_row<T>(in, channels, out);
  }
}
inline void gather(const TensorView& x, int64_t b, int64_t s, Run frames, HeadRange heads, int64_t channels,
                   Stage stage, int64_t offset) {
  with_dtype(x.dtype,
             [&](auto type) { gather_rows<decltype(type)::value>(x, b, s, frames, heads, channels, stage, offset); });
}

// The side of a norm or table that a tensor is on.
struct Side {
  const float *weight, *bias;
  int64_t first_frame;  // table row of the tensor's frame 0
};
inline Side query_side(const TemporalAttention& a) { return {a.norm.q_weight, a.norm.q_bias, a.q_start}; }
inline Side key_side(const TemporalAttention& a) { return {a.norm.k_weight, a.norm.k_bias, 0}; }

// Moments over all heads of the token at (b, t, s); `buffer` holds one row.
inline Moments token_moments(const Norm& norm, const TensorView& x, int64_t b, int64_t t, int64_t s, int64_t heads,
                             int64_t channels, float* buffer) {
  Moments m;
  const Stage one = {buffer, 1, round_up(channels)};
  const int64_t n = heads * channels;
  if (norm.kind == NormKind::layer) {
    float total = 0;
    for (int64_t h = 0; h < heads; ++h) {
      gather(x, b, s, {t, t + 1}, {h, 1}, channels, one, 0);
      total += row_sum(buffer, channels);
    }
    m.mean = total / n;
  }
  float squares = 0;
  for (int64_t h = 0; h < heads; ++h) {
    gather(x, b, s, {t, t + 1}, {h, 1}, channels, one, 0);
    squares += row_squares(buffer, channels, m.mean);
  }
  m.rstd = 1.f / __builtin_sqrtf(squares / n + norm.eps);
  return m;
}

// One row of a rope table as float32: in place where it is float32 already, else converted into buffer.
inline const float* table_row(const TensorView& table, int64_t f, int64_t s, int64_t h, float* buffer) {
  const char* at = table.at(f, s, h);
  if (table.dtype == DType::f32) return reinterpret_cast<const float*>(at);
  with_dtype(table.dtype, [&](auto type) { read_row<decltype(type)::value>(at, table.size[3], buffer); });
  return buffer;
}

// Hands the rows of a coming step to the products of the present one.
struct NextRows {
  const TensorView* const* tensors;
  int count;
  int64_t b, s, first_head, heads;  // query heads
  int tensor = 0;
  int64_t frame = 0, head = 0;

  static bool next(void* context, const char*& at, int64_t& bytes) {
    NextRows& n = *static_cast<NextRows*>(context);
    while (n.tensor < n.count && n.frame >= n.tensors[n.tensor]->size[1]) {
      ++n.tensor;
      n.frame = 0;
    }
    if (n.tensor >= n.count) return false;
    const TensorView& x = *n.tensors[n.tensor];
    const int64_t per = n.tensors[0]->size[3] / x.size[3];  // query heads that share this tensor's head
    const int64_t first = n.first_head / per, heads = n.heads / per;
    const bool adjacent = x.stride[3] == x.size[4];
    at = x.at(n.b, n.frame, n.s, first + n.head);
    bytes = (adjacent ? heads : 1) * x.size[4] * size_of(x.dtype);
    if (adjacent || ++n.head == heads) {
      n.head = 0;
      ++n.frame;
    }
    return true;
  }
};

inline VisibleKeys visible_keys(const TemporalAttention& a, int64_t b, int64_t first_query) {
  const VisibleFrames& v = a.visible;
  const int64_t at = (v.per_sample ? b * a.q.size[1] : 0) + first_query;
  return {v.begin + at, v.end + at, v.low_begin + at, v.low_end + at, v.dense};
}

// A head's bias at a key: its queries lie side by side.
inline int64_t bias_at(const TemporalAttention& a, int64_t head, int64_t key) {
  return ((a.bias_heads > 1 ? head : 0) * a.k.size[1] + key) * a.bias_row;
}
// Adds it to scores (keys, queries).
inline void add_bias(const TemporalAttention& a, int64_t head, Run keys, Run queries, Tile scores) {
  if (!a.bias) return;
  for (int64_t j = 0; j < keys.size(); ++j) {
    const float* from = a.bias + bias_at(a, head, keys.begin + j) + queries.begin;
    for (int64_t i = 0; i < queries.size(); i += W) {
      float* at = scores.at(j, i).data;
      store(at, load(at) + load(from + i));
    }
  }
}

// Key frames of a block that at least one of the queries sees: two runs, relative to the block.
struct SeenKeys {
  Run runs[2];
  explicit SeenKeys(int64_t keys) : runs{{0, keys}, {}} {}  // all of them
  SeenKeys(const VisibleKeys& visible, int64_t queries, int64_t first_key, int64_t keys) : SeenKeys(keys) {
    if (visible.dense) return;
    Hull low, window;
    for (int64_t i = 0; i < queries; ++i) {
      low.add(intersect({visible.low_begin[i] - first_key, visible.low_end[i] - first_key}, {0, keys}));
      window.add(intersect({visible.begin[i] - first_key, visible.end[i] - first_key}, {0, keys}));
    }
    separate(low, window, runs);
  }
  bool any() const { return runs[0].size() + runs[1].size() > 0; }
};

// Per query of a block, its runs relative to a key block, for product_over_runs().
inline void key_runs(const VisibleKeys& visible, int64_t queries, int64_t first_key, int64_t keys, Run* windows,
                     Run* lows) {
  for (int64_t i = 0; i < queries; ++i) {
    windows[i] = intersect({visible.begin[i] - first_key, visible.end[i] - first_key}, {0, keys});
    lows[i] = intersect({visible.low_begin[i] - first_key, visible.low_end[i] - first_key}, {0, keys});
  }
}

}  // namespace vdcore::cpu::VDCORE_ISA
