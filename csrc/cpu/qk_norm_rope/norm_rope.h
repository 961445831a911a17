// QK-norm and rotary embedding of one row: the D channels of one head of one token, float32, in place.
#pragma once

#include "common/frame_runs.h"
#include "cpu/core/arguments.h"
#include "cpu/core/vec.h"

namespace vdcore::cpu::VDCORE_ISA {

VDCORE_INLINE vf load_up_to(const float* p, int64_t n) { return n >= W ? load(p) : load_partial<DType::f32>(p, n); }
VDCORE_INLINE void store_up_to(float* p, vf x, int64_t n) {
  if (n >= W)
    store(p, x);
  else
    store_partial<DType::f32>(p, x, n);
}
// Zero beyond the first n lanes.
VDCORE_INLINE vf first(vf x, int64_t n) { return n >= W ? x : select(iota() < static_cast<int32_t>(n), x, vf{}); }

struct Moments {
  float mean = 0, rstd = 1;
};

// Sums over one row: of x for kind layer, of squares of (x - shift).
VDCORE_INLINE float row_sum(const float* x, int64_t n) {
  vf total = {};
  for (int64_t i = 0; i < n; i += W) total += load_up_to(x + i, n - i);
  return sum(total);
}
VDCORE_INLINE float row_squares(const float* x, int64_t n, float shift) {
  vf total = {};
  for (int64_t i = 0; i < n; i += W) {
    const vf d = first(load_up_to(x + i, n - i) - shift, n - i);
    total += d * d;
  }
  return sum(total);
}

inline Moments row_moments(const Norm& norm, const float* x, int64_t n) {
  Moments m;
  if (norm.kind == NormKind::layer) m.mean = row_sum(x, n) / n;
  m.rstd = 1.f / __builtin_sqrtf(row_squares(x, n, m.mean) / n + norm.eps);
  return m;
}

// x = (x - mean) * rstd * weight + bias; padding lanes stay 0.
inline void normalize(float* x, int64_t n, const Moments& m, const float* weight, const float* bias) {
  for (int64_t i = 0; i < n; i += W) {
    vf y = (load(x + i) - m.mean) * m.rstd;
    if (weight) y *= load_up_to(weight + i, n - i);
    if (bias) y += load_up_to(bias + i, n - i);
    store(x + i, first(y, n - i));
  }
}

// Rotates pairs of channels by the table's angles; `direction` -1 rotates back. Padded rows only: reads whole vectors.
inline void rotate(float* x, int64_t pairs, RopeStyle style, const float* cos, const float* sin, float direction) {
  if (style == RopeStyle::half) {
    for (int64_t i = 0; i < pairs; i += W) {
      const vf c = load_up_to(cos + i, pairs - i), s = load_up_to(sin + i, pairs - i) * direction;
      const vf a = load_up_to(x + i, pairs - i), b = load_up_to(x + pairs + i, pairs - i);
      store_up_to(x + i, a * c - b * s, pairs - i);
      store_up_to(x + pairs + i, b * c + a * s, pairs - i);
    }
    return;
  }
  const vf sign = select((iota() & 1) == 0, splat(-direction), splat(direction));
  for (int64_t i = 0; i < pairs; i += W) {
    const vf c = load_up_to(cos + i, pairs - i), s = load_up_to(sin + i, pairs - i);
    float* at = x + 2 * i;
    const int64_t left = 2 * (pairs - i);
    const vf low = load_up_to(at, left);
    store_up_to(at, low * repeat_low(c) + swap_pairs(low) * (repeat_low(s) * sign), left);
    if (left > W) {
      const vf high = load_up_to(at + W, left - W);
      store_up_to(at + W, high * repeat_high(c) + swap_pairs(high) * (repeat_high(s) * sign), left - W);
    }
  }
}

// Gradient of the table row: dcos += dy1 x1 + dy2 x2, dsin += dy2 x1 - dy1 x2, with x the row before the rotation.
inline void rotate_table_gradient(const float* x, const float* dy, int64_t pairs, RopeStyle style, float* dcos,
                                  float* dsin) {
  const int64_t step = style == RopeStyle::half ? 1 : 2, other = style == RopeStyle::half ? pairs : 1;
  for (int64_t i = 0; i < pairs; ++i) {
    const float x1 = x[i * step], x2 = x[i * step + other], d1 = dy[i * step], d2 = dy[i * step + other];
    dcos[i] += d1 * x1 + d2 * x2;
    dsin[i] += d2 * x1 - d1 * x2;
  }
}

// Gradient through the norm: dy becomes dx; weight and bias gradients are added to dweight, dbias where given. x is the
// raw row. `over_all` sums are (sum of dy w, sum of dy w xhat) over the whole token; pass the row's own for "head".
struct NormSums {
  float dy = 0, dy_x = 0;
};
inline NormSums norm_gradient_sums(const float* x, const float* dy, int64_t n, const Moments& m, const float* weight) {
  vf total = {}, total_x = {};
  for (int64_t i = 0; i < n; i += W) {
    vf d = load_up_to(dy + i, n - i);
    if (weight) d *= load_up_to(weight + i, n - i);
    total += d;
    total_x += d * first((load(x + i) - m.mean) * m.rstd, n - i);
  }
  return {sum(total), sum(total_x)};
}
inline void norm_gradient(const Norm& norm, const float* x, float* dy, int64_t n, const Moments& m, const float* weight,
                          const NormSums& sums, int64_t channels, float* dweight, float* dbias) {
  const float mean_dy = norm.kind == NormKind::layer ? sums.dy / channels : 0, mean_dy_x = sums.dy_x / channels;
  for (int64_t i = 0; i < n; i += W) {
    const vf hat = first((load(x + i) - m.mean) * m.rstd, n - i);
    vf d = load(dy + i);
    if (dweight) store_up_to(dweight + i, load_up_to(dweight + i, n - i) + d * hat, n - i);
    if (dbias) store_up_to(dbias + i, load_up_to(dbias + i, n - i) + d, n - i);
    if (weight) d *= load_up_to(weight + i, n - i);
    store(dy + i, first((d - mean_dy - hat * mean_dy_x) * m.rstd, n - i));
  }
}

}  // namespace vdcore::cpu::VDCORE_ISA
