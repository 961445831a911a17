// Norm and RoPE of rows in registers: see rows.cuh for how they lie.
#pragma once

#include "cuda/core/rows.cuh"

namespace vdcore::cuda {

// Mean and 1 / deviation (rms: 0 and 1 / rms) of the lane's row.
struct RowMoments {
  float mean, scale;
};

template <typename E, int C>
VDCORE_DEVICE RowMoments moments(const Rows<C>& r, NormKind kind, float eps, int D) {
  RowMoments m{0, 1};
  if (kind == NormKind::none) return m;
  const float each = 1.f / static_cast<float>(D);
  if (kind == NormKind::layer) {
    float total = 0;
    VDCORE_UNROLL
    for (int i = 0; i < C; ++i) VDCORE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Float2 x = unpack<E>(r.x[i].x[j]);
      total += x.lo + x.hi;
    }
    m.mean = row_sum(total) * each;
  }
  float squares = 0;
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) VDCORE_UNROLL
  for (int j = 0; j < 4; ++j) {
    const Float2 x = unpack<E>(r.x[i].x[j]);
    const float lo = x.lo - m.mean, hi = x.hi - m.mean;
    if (has_channels(i, D)) squares += lo * lo + hi * hi;
  }
  m.scale = reciprocal_root(row_sum(squares) * each + eps);
  return m;
}

VDCORE_DEVICE float as_float(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } x{bits};
  return x.f;
}

// Eight neighbouring channels of a row of float32.
struct Float8 {
  Vec4 x[2];
  VDCORE_DEVICE explicit Float8(const float* p) : x{load_global<Vec4>(p), load_global<Vec4>(p + 4)} {}
  VDCORE_DEVICE float operator[](int i) const { return as_float(x[i / 4].x[i % 4]); }
};

// Normalizes the rows, and rotates pairs of neighbouring channels. `table`: offset of the angles of the lane's row.
// Tables hold a multiple of four pairs, at multiples of 16 bytes.
template <typename E, int C>
VDCORE_DEVICE void norm_rope(Rows<C>& r, bool valid, const NormRope& how, const HeadNorm& norm, int64_t table, int D) {
  const RowMoments m = moments<E>(r, how.kind, how.eps, D);
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) {
    const int first = 32 * i + 8 * lane_column();
    if (!valid || first >= D) continue;
    float x[8];
    VDCORE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Float2 both = unpack<E>(r.x[i].x[j]);
      x[2 * j] = (both.lo - m.mean) * m.scale;
      x[2 * j + 1] = (both.hi - m.mean) * m.scale;
    }
    if (norm.weight) {
      const Float8 w(norm.weight + first);
      VDCORE_UNROLL
      for (int e = 0; e < 8; ++e) x[e] *= w[e];
    }
    if (norm.bias) {
      const Float8 b(norm.bias + first);
      VDCORE_UNROLL
      for (int e = 0; e < 8; ++e) x[e] += b[e];
    }
    if (how.style == RopeStyle::interleaved && first < 2 * how.pairs) {
      const Vec4 c = load_global<Vec4>(how.cos + table + first / 2), s = load_global<Vec4>(how.sin + table + first / 2);
      VDCORE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float lo = x[2 * j], hi = x[2 * j + 1], cos = as_float(c.x[j]), sin = as_float(s.x[j]);
        x[2 * j] = lo * cos - hi * sin;
        x[2 * j + 1] = hi * cos + lo * sin;
      }
    }
    VDCORE_UNROLL
    for (int j = 0; j < 4; ++j) r.x[i].x[j] = pack<E>(x[2 * j], x[2 * j + 1]);
  }
}

// The channel itself, normalized. `row`: where its row starts.
template <typename E>
VDCORE_DEVICE float normalized_channel(const char* row, int channel, const RowMoments& m, const HeadNorm& norm) {
  float y = (unpack<E>(load_global<uint16_t>(row + 2 * channel)).lo - m.mean) * m.scale;
  if (norm.weight) y *= load_global<float>(norm.weight + channel);
  if (norm.bias) y += load_global<float>(norm.bias + channel);
  return y;
}

// The pair that a rotated channel belongs to.
struct Pair {
  int index, other;  // the other channel
  bool upper;        // the channel is the second one
};
VDCORE_DEVICE Pair pair_of(const NormRope& how, int channel) {
  if (how.style == RopeStyle::half) {
    const bool upper = channel >= how.pairs;
    return {upper ? channel - how.pairs : channel, upper ? channel - how.pairs : channel + how.pairs, upper};
  }
  return {channel / 2, channel ^ 1, channel % 2 == 1};
}

// As above for any table, pairs of either style: the other channel of a pair is read again, from L1.
template <typename E, int C>
VDCORE_DEVICE void norm_rope_any(Rows<C>& r, const char* row, bool valid, const NormRope& how, const HeadNorm& norm,
                                 int64_t table, int D) {
  const RowMoments m = moments<E>(r, how.kind, how.eps, D);
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) VDCORE_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (!valid || !has_channels(i, D)) continue;
    float x[2];
    VDCORE_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int channel = 32 * i + 8 * lane_column() + 2 * j + e;
      x[e] = normalized_channel<E>(row, channel, m, norm);
      if (how.style == RopeStyle::none || channel >= 2 * how.pairs) continue;
      const Pair pair = pair_of(how, channel);
      const float other = normalized_channel<E>(row, pair.other, m, norm);
      const float c = load_global<float>(how.cos + table + pair.index);
      const float s = load_global<float>(how.sin + table + pair.index);
      x[e] = x[e] * c + (pair.upper ? other * s : -other * s);
    }
    r.x[i].x[j] = pack<E>(x[0], x[1]);
  }
}

}  // namespace vdcore::cuda
