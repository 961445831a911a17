// Norm and rope of all heads of one token at a time: rows of heads padded with a vector of slack, so that no loop over
// channels has a partial vector, and sums over channels taken for W heads at once.
#pragma once

#include "cpu/core/arguments.h"
#include "cpu/core/tile.h"

namespace vdcore::cpu::VDCORE_ISA {

// (heads, row), row > round_up(channels). Lanes from `channels` to the next whole vector are 0, those after it
// anything.
struct HeadRows {
  float* data;
  int64_t row;
  VDCORE_INLINE float* operator[](int64_t h) const { return data + h * row; }
};
VDCORE_INLINE int64_t head_row(int64_t channels) { return round_up(channels) + W; }

template <DType T>
VDCORE_INLINE void read_heads(const char* in, int64_t head_stride, int64_t heads, int64_t channels, HeadRows out) {
  for (int64_t h = 0; h < heads; ++h) read_row<T>(in + h * head_stride * size_of(T), channels, out[h]);
}

// out[h] = sum of the lanes of part(h); writes whole vectors.
template <typename Part>
VDCORE_INLINE void sum_lanes(int64_t heads, float* out, const Part& part) {
  for (int64_t h = 0; h < heads; h += W) {
    vf x[W];
    for (int i = 0; i < W; ++i) x[i] = h + i < heads ? part(h + i) : vf{};
    transpose_stages<W / 2>(x);
#pragma GCC unroll 8
    for (int width = W / 2; width > 0; width /= 2)
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) x[i] += x[i + width];
    store(out + h, x[0]);
  }
}

// One number per head, or the same for all of them.
VDCORE_INLINE void share_sum(int64_t heads, float* x) {
  float total = 0;
  for (int64_t h = 0; h < heads; ++h) total += x[h];
  for (int64_t h = 0; h < heads; h += W) store(x + h, splat(total));
}

// mean and rstd of each head's row.
VDCORE_INLINE void head_moments(const Norm& norm, HeadRows x, int64_t heads, int64_t channels, float* mean,
                                float* rstd) {
  const float n = static_cast<float>(norm.over_all ? heads * channels : channels);
  const int64_t whole = channels / W * W;
  if (norm.kind == NormKind::layer) {
    sum_lanes(heads, mean, [&](int64_t h) __attribute__((always_inline)) {
      const float* row = x[h];
      vf total = {};
      for (int64_t c = 0; c < channels; c += W) total += load(row + c);
      return total;
    });
    if (norm.over_all) share_sum(heads, mean);
    for (int64_t h = 0; h < heads; h += W) store(mean + h, load(mean + h) / n);
  } else {
    for (int64_t h = 0; h < heads; h += W) store(mean + h, vf{});
  }
  sum_lanes(heads, rstd, [&](int64_t h) __attribute__((always_inline)) {
    const float* row = x[h];
    const vf shift = splat(mean[h]);
    vf total = {};
    for (int64_t c = 0; c < whole; c += W) {
      const vf d = load(row + c) - shift;
      total += d * d;
    }
    if (whole < channels) {
      const vf d = select(iota() < static_cast<int32_t>(channels - whole), load(row + whole) - shift, vf{});
      total += d * d;
    }
    return total;
  });
  if (norm.over_all) share_sum(heads, rstd);
  for (int64_t h = 0; h < heads; ++h) rstd[h] = 1.f / __builtin_sqrtf(rstd[h] / n + norm.eps);
}

// x = (x - mean) * rstd * weight + bias.
VDCORE_INLINE void normalize_head(float* x, int64_t channels, float mean, float rstd, const float* weight,
                                  const float* bias) {
  const vf shift = splat(mean), factor = splat(rstd);
  for (int64_t c = 0; c < channels; c += W) {
    vf y = (load(x + c) - shift) * factor;
    if (weight) y *= load(weight + c);
    if (bias) y += load(bias + c);
    store(x + c, y);
  }
}

// The angles of one token, or of one of its heads, as vectors meet channels: for style half (R / 2,), for interleaved
// (R,) with every cosine twice and every sine as -sin, sin.
struct Angles {
  float *cos, *sin;
  int64_t pairs;
  RopeStyle style;

  // `row`: R / 2 numbers of scratch memory.
  template <DType T>
  VDCORE_INLINE void read(const char* cos_row, const char* sin_row, float* row) const {
    if (style == RopeStyle::half) {
      read_row<T>(cos_row, pairs, cos);
      read_row<T>(sin_row, pairs, sin);
      return;
    }
    const vf sign = select((iota() & 1) == 0, splat(-1.f), splat(1.f));
    read_row<T>(cos_row, pairs, row);
    for (int64_t i = 0; i < pairs; i += W) {
      store(cos + 2 * i, repeat_low(load(row + i)));
      store(cos + 2 * i + W, repeat_high(load(row + i)));
    }
    read_row<T>(sin_row, pairs, row);
    for (int64_t i = 0; i < pairs; i += W) {
      store(sin + 2 * i, repeat_low(load(row + i)) * sign);
      store(sin + 2 * i + W, repeat_high(load(row + i)) * sign);
    }
  }
};

// out = x rotated by the angles, or back. Each step writes whole vectors, and what it spills beyond its channels the
// next one overwrites: the second halves, then the channels that are not rotated.
template <bool Back>
VDCORE_INLINE void rotate_head(const float* x, int64_t channels, const Angles& a, float* out) {
  const int64_t rotated = 2 * a.pairs;
  const auto turn = [](vf y, vf partner, vf c, vf s)
                        __attribute__((always_inline)) { return Back ? y * c - partner * s : y * c + partner * s; };
  if (a.style == RopeStyle::half) {
    for (int64_t c = 0; c < a.pairs; c += W)
      store(out + c, turn(load(x + c), -load(x + a.pairs + c), load(a.cos + c), load(a.sin + c)));
    for (int64_t c = 0; c < a.pairs; c += W)
      store(out + a.pairs + c, turn(load(x + a.pairs + c), load(x + c), load(a.cos + c), load(a.sin + c)));
  } else {
    for (int64_t c = 0; c < rotated; c += W) {
      const vf y = load(x + c);
      store(out + c, turn(y, swap_pairs(y), load(a.cos + c), load(a.sin + c)));
    }
  }
  for (int64_t c = rotated; c < round_up(channels); c += W) store(out + c, load(x + c));
}

// Adds the gradient of the angles, in the same form: x before the rotation, dy after it.
VDCORE_INLINE void add_angle_gradient(const float* x, const float* dy, const Angles& sums) {
  if (sums.style == RopeStyle::half) {
    for (int64_t c = 0; c < sums.pairs; c += W) {
      const vf a = load(x + c), b = load(x + sums.pairs + c), da = load(dy + c), db = load(dy + sums.pairs + c);
      store(sums.cos + c, load(sums.cos + c) + (da * a + db * b));
      store(sums.sin + c, load(sums.sin + c) + (db * a - da * b));
    }
    return;
  }
  for (int64_t c = 0; c < 2 * sums.pairs; c += W) {
    const vf y = load(x + c), d = load(dy + c);
    store(sums.cos + c, load(sums.cos + c) + d * y);
    store(sums.sin + c, load(sums.sin + c) + d * swap_pairs(y));
  }
}

// Adds such sums to a row of the table's gradient.
VDCORE_INLINE void add_to_table(const Angles& sums, float* dcos, float* dsin) {
  const bool half = sums.style == RopeStyle::half;
  for (int64_t i = 0; i < sums.pairs; ++i) {
    dcos[i] += half ? sums.cos[i] : sums.cos[2 * i] + sums.cos[2 * i + 1];
    dsin[i] += half ? sums.sin[i] : sums.sin[2 * i + 1] - sums.sin[2 * i];
  }
}

}  // namespace vdcore::cpu::VDCORE_ISA
