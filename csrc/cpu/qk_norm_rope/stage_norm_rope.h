// Norm and rope on the rows of a stage: all heads of one token at a time, so that they share its angles and the sums
// over channels are taken for W heads at once.
#pragma once

#include "cpu/core/arena.h"
#include "cpu/core/head_rows.h"
#include "cpu/temporal_attention/tiles.h"

namespace vdcore::cpu::VDCORE_ISA {

class StageNormRope {
 public:
  StageNormRope(const TemporalAttention& a, int64_t row, Arena& arena) : row_(row) {
    const int64_t width = a.norm.kind == NormKind::none ? 0 : a.norm.over_all ? a.q.size[3] * a.q.size[4] : row;
    for (Weights& w : weights_) w = {arena.floats(width + W), arena.floats(width + W)};
    cos_ = arena.floats(row + 2 * W);
    sin_ = arena.floats(row + 2 * W);
    buffer_ = arena.floats(row + W);
    mean_ = arena.floats(round_up(a.q.size[3]));
    rstd_ = arena.floats(round_up(a.q.size[3]));
    if (!buffer_ || !width) return;
    fill(weights_[0], a.norm.q_weight, a.norm.q_bias, a.norm.over_all ? width : a.q.size[4]);
    fill(weights_[1], a.norm.k_weight, a.norm.k_bias, a.norm.over_all ? a.k.size[3] * a.k.size[4] : a.q.size[4]);
  }

  void queries(const TemporalAttention& a, int64_t b, int64_t s, Run frames, HeadRange heads, Stage stage) const {
    apply(a, weights_[0], a.q, a.q_start, b, s, frames, heads, stage, 0);
  }
  void keys(const TemporalAttention& a, int64_t b, int64_t s, Run frames, HeadRange heads, Stage stage,
            int64_t offset) const {
    apply(a, weights_[1], a.k, 0, b, s, frames, heads, stage, offset);
  }

 private:
  int64_t row_;
  struct Weights {
    float *weight, *bias;  // (D,) or (heads * D,), and a vector of slack
  };
  Weights weights_[2];
  float *cos_, *sin_, *buffer_;  // one row of angles as they meet channels
  float *mean_, *rstd_;          // per head

  static void fill(const Weights& w, const float* weight, const float* bias, int64_t n) {
    for (int64_t i = 0; i < n + W; ++i) {
      w.weight[i] = weight && i < n ? weight[i] : 1.f;
      w.bias[i] = bias && i < n ? bias[i] : 0.f;
    }
  }

  // Stage rows [offset, offset + frames.size()) hold x in `frames`; x's frame 0 has row `first_row` of the rope table.
  void apply(const TemporalAttention& a, const Weights& weights, const TensorView& x, int64_t first_row, int64_t b,
             int64_t s, Run frames, HeadRange heads, Stage stage, int64_t offset) const {
    const int64_t D = x.size[4];
    const bool norm = a.norm.kind != NormKind::none, rope = a.rope.style != RopeStyle::none;
    const bool per_head = rope && a.rope.cos.stride[2] != 0;
    for (int64_t t = frames.begin; t < frames.end && (norm || rope); ++t) {
      const HeadRows rows = {stage.head(0).at(t - frames.begin + offset, 0).data, stage.frames * stage.row};
      if (norm && a.norm.over_all) {
        const Moments m = token_moments(a.norm, x, b, t, s, x.size[3], D, buffer_);
        for (int64_t h = 0; h < heads.count; ++h) mean_[h] = m.mean, rstd_[h] = m.rstd;
      } else if (norm) {
        head_moments(a.norm, rows, heads.count, D, mean_, rstd_);
      }
      if (rope && !per_head) read_angles(a.rope, first_row + t, s, 0);
      for (int64_t h = 0; h < heads.count; ++h) {
        const int64_t w = a.norm.over_all ? (heads.first + h) * D : 0;
        if (per_head) read_angles(a.rope, first_row + t, s, heads.first + h);
        if (norm && a.rope.style == RopeStyle::interleaved)
          each_vector(rows[h], D, [&](vf y, int64_t c) { return turn(normed(y, weights, w, h, c), c); });
        else if (norm)
          each_vector(rows[h], D, [&](vf y, int64_t c) { return normed(y, weights, w, h, c); });
        else if (a.rope.style == RopeStyle::interleaved)
          each_vector(rows[h], D, [&](vf y, int64_t c) { return turn(y, c); });
        if (a.rope.style == RopeStyle::half) rotate(rows[h], a.rope.cos.size[3], a.rope.style, cos_, sin_, 1.f);
      }
    }
  }

  // Padding lanes become anything: no sum reaches over them.
  template <typename Body>
  static VDCORE_INLINE void each_vector(float* x, int64_t channels, const Body& body) {
    for (int64_t c = 0; c < channels; c += W) store(x + c, body(load(x + c), c));
  }
  VDCORE_INLINE vf normed(vf y, const Weights& weights, int64_t w, int64_t h, int64_t c) const {
    return (y - splat(mean_[h])) * splat(rstd_[h]) * load(weights.weight + w + c) + load(weights.bias + w + c);
  }
  VDCORE_INLINE vf turn(vf y, int64_t c) const { return y * load(cos_ + c) + swap_pairs(y) * load(sin_ + c); }

  // Style half: the table's row. Interleaved: every angle twice, the sines' signs with them, and what leaves a channel
  // as it is past the last.
  void read_angles(const Rope& rope, int64_t f, int64_t s, int64_t h) const {
    const int64_t pairs = rope.cos.size[3];
    with_dtype(rope.cos.dtype, [&](auto type) {
      const Angles angles = {cos_, sin_, pairs, rope.style};
      angles.template read<decltype(type)::value>(rope.cos.at(f, s, h), rope.sin.at(f, s, h), buffer_);
    });
    if (rope.style == RopeStyle::half) return;
    for (int64_t c = 2 * pairs; c < row_; ++c) cos_[c] = 1, sin_[c] = 0;
  }
};

}  // namespace vdcore::cpu::VDCORE_ISA
