// Norm and RoPE of rows in registers: see rows.cuh for how they lie.
#pragma once

#include "cuda/core/rows.cuh"

namespace vdcore::cuda {

// A row is normalized as x scale + shift: scale is 1 / deviation (rms: 1 / rms), shift is -mean scale (rms: 0).
struct RowMoments {
  float scale, shift;
  VDCORE_DEVICE float operator()(float x) const { return fmaf(x, scale, shift); }
};

// Of the lane's row; of a row that is not there, 0 and 0.
template <typename E, int C>
VDCORE_DEVICE RowMoments moments(const Rows<C>& r, bool there, NormKind kind, float eps, int D) {
  if (kind == NormKind::none) return {there ? 1.f : 0.f, 0};
  const float each = reciprocal(static_cast<float>(D));
  float mean = 0, squares = 0;
  if (kind == NormKind::layer) {
    unroll<C, 4>([&](int i, int j) {
      const Float2 x = unpack<E>(r.x[i].x[j]);
      mean += x.lo + x.hi;
    });
    mean = row_sum(mean) * each;
    unroll<C, 4>([&](int i, int j) {
      const Float2 x = unpack<E>(r.x[i].x[j]);
      const float lo = x.lo - mean, hi = x.hi - mean;
      if (has_channels(i, D)) squares = fmaf(hi, hi, fmaf(lo, lo, squares));
    });
  } else {
    unroll<C, 4>([&](int i, int j) {
      const Float2 x = unpack<E>(r.x[i].x[j]);
      squares = fmaf(x.hi, x.hi, fmaf(x.lo, x.lo, squares));
    });
  }
  const float root = reciprocal_root(row_sum(squares) * each + eps), scale = there ? root : 0;
  return {scale, kind == NormKind::layer ? -mean * scale : 0};
}

union Word {
  uint32_t bits;
  float number;
};
VDCORE_DEVICE float as_float(uint32_t bits) { return Word{bits}.number; }
VDCORE_DEVICE uint32_t as_bits(float number) {
  Word x;
  x.number = number;
  return x.bits;
}

// Eight neighbouring channels of a row of float32; `otherwise` where there is none.
struct Float8 {
  Vec4 x[2];
  VDCORE_DEVICE Float8(const float* p, bool there, float otherwise)
      : x{load_global_or(p, there, as_bits(otherwise)), load_global_or(p + 4, there, as_bits(otherwise))} {}
  VDCORE_DEVICE float operator[](int i) const { return as_float(x[i / 4].x[i % 4]); }
};

// Weight and bias of the lane's channels from 32 i on: 0 past the last channel.
struct WeightBias {
  Float8 weight, bias;
  VDCORE_DEVICE WeightBias(const HeadNorm& norm, int i, int D)
      : weight(norm.weight + 32 * i + 8 * lane_column(), norm.weight && has_channels(i, D), has_channels(i, D) ? 1 : 0),
        bias(norm.bias + 32 * i + 8 * lane_column(), norm.bias && has_channels(i, D), 0) {}
};

VDCORE_DEVICE void rotate(float& a, float& b, float cos, float sin) {
  const float before = a;
  a = before * cos - b * sin;
  b = b * cos + before * sin;
}

// Normalizes rows, and rotates pairs of neighbouring channels. `table`: offsets of the angles of the lane's rows.
// Tables hold a multiple of four pairs, at multiples of 16 bytes. No branch over loads: what is not there is 1 or 0,
// and rows that are not there stay finite.
template <typename E, int C, int M>
VDCORE_DEVICE void norm_rope(Rows<C> (&r)[M], const bool (&there)[M], const NormRope& how, const HeadNorm& norm,
                             const int64_t (&table)[M], int D) {
  RowMoments of[M];
  unroll<M>([&](int m) { of[m] = moments<E>(r[m], there[m], how.kind, how.eps, D); });
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) {
    const int pair = 16 * i + 4 * lane_column();
    const WeightBias of_channels(norm, i, D);
    unroll<M>([&](int m) {
      const bool rotates = there[m] && how.style == RopeStyle::interleaved && pair < how.pairs;
      const Vec4 c = load_global_or(how.cos + table[m] + pair, rotates, 0);
      const Vec4 s = load_global_or(how.sin + table[m] + pair, rotates, 0);
      float y[8];
      unroll<4>([&](int j) {
        const Float2 x = unpack<E>(r[m].x[i].x[j]);
        y[2 * j] = fmaf(of[m](x.lo), of_channels.weight[2 * j], of_channels.bias[2 * j]);
        y[2 * j + 1] = fmaf(of[m](x.hi), of_channels.weight[2 * j + 1], of_channels.bias[2 * j + 1]);
      });
      if (rotates) unroll<4>([&](int j) { rotate(y[2 * j], y[2 * j + 1], as_float(c.x[j]), as_float(s.x[j])); });
      unroll<4>([&](int j) { r[m].x[i].x[j] = pack<E>(y[2 * j], y[2 * j + 1]); });
    });
  }
}

// The channel itself, normalized. `row`: where its row starts.
template <typename E>
VDCORE_DEVICE float normalized_channel(const char* row, int channel, const RowMoments& m, const HeadNorm& norm) {
  float y = m(unpack<E>(load_global<uint16_t>(row + 2 * channel)).lo);
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
  const RowMoments m = moments<E>(r, valid, how.kind, how.eps, D);
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
