// Norm and RoPE of rows in registers: see rows.cuh for how they lie.
#pragma once

#include "cuda/core/rows.cuh"

namespace vdcore::cuda {

// A row is normalized as x scale + shift: scale is 1 / deviation (rms: 1 / rms), shift is -mean scale (rms: 0).
struct RowMoments {
  float scale, shift;
  VDCORE_DEVICE float operator()(float x) const { return fmaf(x, scale, shift); }
};

// Sums over the channels of the lane's rows, of squares: products of rows with themselves, which cost a lane two
// instructions per 32 channels and row in place of 16.
template <typename E, int C, int M>
VDCORE_DEVICE void squares_of_rows(float (&squares)[M], const Rows<C> (&r)[M], int D) {
  const bool holds = lane_column() == lane_row() / 2, odd = lane_row() % 2 == 1;  // of a product's diagonal
  unroll<M>([&](int m) {
    float s[4] = {0, 0, 0, 0};
    inner_product<E>(s, r[m / 2 * 2], r[M == 1 ? 0 : m / 2 * 2 + 1], r[m], D);
    const float lower = m % 2 ? s[2] : s[0], upper = m % 2 ? s[3] : s[1];
    squares[m] = row_sum(holds ? (odd ? upper : lower) : 0);
  });
}

// Of the lane's rows; of a row that is not there, 0 and 0. kLayer: it may be layer norm.
template <typename E, bool kLayer, int C, int M>
VDCORE_DEVICE void moments(RowMoments (&of)[M], const Rows<C> (&r)[M], const bool (&there)[M], NormKind kind, float eps,
                           int D) {
  const float each = reciprocal(static_cast<float>(D));
  float squares[M], mean[M];
  squares_of_rows<E>(squares, r, D);
  unroll<M>([&](int m) { mean[m] = 0; });
  if (kLayer && kind == NormKind::layer)
    unroll<M>([&](int m) {
      unroll<C, 4>([&](int i, int j) {
        const Float2 x = unpack<E>(r[m].x[i].x[j]);
        mean[m] += x.lo + x.hi;
      });
      mean[m] = row_sum(mean[m]) * each;
      squares[m] = 0;
      unroll<C, 4>([&](int i, int j) {
        const Float2 x = unpack<E>(r[m].x[i].x[j]);
        const float lo = x.lo - mean[m], hi = x.hi - mean[m];
        if (has_channels(i, D)) squares[m] = fmaf(hi, hi, fmaf(lo, lo, squares[m]));
      });
      squares[m] = row_sum(squares[m]);
    });
  unroll<M>([&](int m) {
    const float root = kind == NormKind::none ? 1 : reciprocal_root(fmaf(squares[m], each, eps));
    of[m].scale = there[m] ? root : 0;
    of[m].shift = kLayer ? -mean[m] * of[m].scale : 0;
  });
}

template <typename E, bool kLayer, int C>
VDCORE_DEVICE RowMoments moments(const Rows<C>& r, bool there, NormKind kind, float eps, int D) {
  RowMoments of[1];
  const Rows<C> rows[1] = {r};
  moments<E, kLayer>(of, rows, {there}, kind, eps, D);
  return of[0];
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

// Weight and bias, if there may be one, of the lane's channels from 32 i on.
template <bool kBias>
struct WeightBias {
  Float8 weight, bias;
  VDCORE_DEVICE WeightBias(const HeadNorm& norm, int i, int D)
      : weight(norm.weight + 32 * i + 8 * lane_column(), norm.weight && has_channels(i, D),
               kBias && !has_channels(i, D) ? 0 : 1),
        bias(norm.bias + 32 * i + 8 * lane_column(), kBias && norm.bias && has_channels(i, D), 0) {}
  // x normalized: 0 past the last channel, where x is.
  VDCORE_DEVICE float operator()(const RowMoments& m, float x, int e) const {
    return kBias ? fmaf(m(x), weight[e], bias[e]) : x * m.scale * weight[e];
  }
};

VDCORE_DEVICE void rotate(float& a, float& b, float cos, float sin) {
  const float before = a;
  a = before * cos - b * sin;
  b = b * cos + before * sin;
}

// Cosines and sines of four pairs of neighbouring channels.
struct Angles {
  Vec4 cos, sin;
  // Pair j of them; `direction` -1: back.
  VDCORE_DEVICE void turn(float& a, float& b, int j, float direction = 1) const {
    rotate(a, b, as_float(cos.x[j]), direction * as_float(sin.x[j]));
  }
};

// Chunks of C that D fills, where C is the least number that holds it; of layer norm's kernels it is not.
constexpr int filled_chunks(int C, bool layer) { return layer || C == 2 ? 0 : C - 1; }

// The angles of the lane's row, at `table`: a multiple of four pairs, at multiples of 16 bytes. kWhole: the table has
// all pairs of a head, and a row that is not there has some row's; else what does not rotate has cosine 1 and sine 0.
// Either way no branch over loads. kFilled: filled chunks.
template <bool kWhole, int kFilled>
struct AngleTable {
  const NormRope& how;
  const float *cos, *sin;  // of the lane's first channels
  bool there;

  VDCORE_DEVICE AngleTable(const NormRope& how, int64_t table, bool there)
      : how(how), cos(how.cos + table + 4 * lane_column()), sin(how.sin + table + 4 * lane_column()), there(there) {}

  // Channels 32 i + 8 (lane % 4) and on.
  VDCORE_DEVICE Angles chunk(int i) const {
    const int pair = 16 * i + 4 * lane_column();
    if constexpr (kWhole) {
      // Past the last channel the last pairs' angles.
      const int past = pair - (how.pairs - 4), back = i >= kFilled && past > 0 ? past : 0;
      return {load_global<Vec4>(cos + 16 * i - back), load_global<Vec4>(sin + 16 * i - back)};
    } else {
      const bool rotates = there && how.style == RopeStyle::interleaved && pair < how.pairs;
      return {load_global_or(cos + 16 * i, rotates, as_bits(1)), load_global_or(sin + 16 * i, rotates, 0)};
    }
  }
};

// Normalizes rows, whose moments are m, and rotates pairs of neighbouring channels. `table`: offsets of the angles of
// the lane's rows. Rows that are not there stay finite. kLayer: it may be layer norm, which alone has biases.
template <typename E, bool kLayer, bool kWhole, int C, int M>
VDCORE_DEVICE void norm_rope(Rows<C> (&r)[M], const RowMoments (&of)[M], const bool (&there)[M], const NormRope& how,
                             const HeadNorm& norm, const int64_t (&table)[M], int D) {
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) {
    const WeightBias<kLayer> of_channels(norm, i, D);
    unroll<M>([&](int m) {
      const Angles angles = AngleTable<kWhole, filled_chunks(C, kLayer)>(how, table[m], there[m]).chunk(i);
      unroll<4>([&](int j) {
        const Float2 x = unpack<E>(r[m].x[i].x[j]);
        float lo = of_channels(of[m], x.lo, 2 * j), hi = of_channels(of[m], x.hi, 2 * j + 1);
        angles.turn(lo, hi, j);
        r[m].x[i].x[j] = pack<E>(lo, hi);
      });
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
  const RowMoments m = moments<E, true>(r, valid, how.kind, how.eps, D);
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
