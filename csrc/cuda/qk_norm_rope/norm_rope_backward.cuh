// The backward of norm and RoPE: gradients of 16 rows in registers, as sums of products leave them (rows.cuh).
//
// With x^ = (x - mean) / deviation, y = w x^ + b, z = y rotated by its angles, and gradients dz:
//   dy = dz rotated back, dw = sum of dy x^, db = sum of dy, dx = (w dy - mean(w dy) - x^ mean(w dy x^)) / deviation,
// mean(w dy) only for layer norm. Sums over rows: of a warp in registers, of a block in shared memory, and one row
// of the workspace per block, which the caller adds up. No atomics: the same bits every time.
#pragma once

#include "cuda/qk_norm_rope/norm_rope.cuh"

namespace vdcore::cuda {

// Weight sums of a warp in shared memory: (q's weight, k's weight, q's bias, k's bias; 32 C channels).
constexpr int weight_sum_bytes(int C) { return 4 * 32 * C * 4; }

// Where one role's sums are. `wanted` must be the kernel's parameter: the compiler then knows that a warp agrees on it,
// and shuffles behind it are single instructions.
struct WeightSums {
  float *weight, *bias;
  bool wanted;
};
template <int C>
VDCORE_DEVICE WeightSums weight_sums_of(float* warp, bool keys, bool wanted) {
  return {warp + (keys ? 32 * C : 0), warp + (keys ? 96 * C : 64 * C), wanted};
}

// Lane (row r, column c) of a warp is the only one that touches channels 32 i + 8 c + r before the block adds them up.
VDCORE_DEVICE int weight_sum_channel(int i) { return 32 * i + 8 * lane_column() + lane_row(); }

template <int C>
VDCORE_DEVICE void clear_weight_sums(float* warp) {
  VDCORE_UNROLL
  for (int part = 0; part < 4; ++part) VDCORE_UNROLL
  for (int i = 0; i < C; ++i) store_shared(warp + 32 * C * part + weight_sum_channel(i), 0.f);
}

// Sums over the lanes of a column.
VDCORE_DEVICE float column_sum(float x) {
  x += shuffle_xor(x, 4);
  x += shuffle_xor(x, 8);
  return x + shuffle_xor(x, 16);
}

// Value r of the eight, summed over the lanes of a column, for the lane of row r. Each step hands half of the values
// over and keeps the sums of the other half: 7 shuffles, where eight whole sums take 24.
VDCORE_DEVICE float scattered_column_sum(const float (&of)[8]) {
  const int r = lane_row();
  float four[4], two[2];
  const auto half = [&](int bit, float lo, float hi) {
    const bool upper = (r & bit) != 0;
    return (upper ? hi : lo) + shuffle_xor(upper ? lo : hi, 4 * bit);
  };
  VDCORE_UNROLL
  for (int e = 0; e < 4; ++e) four[e] = half(4, of[e], of[e + 4]);
  VDCORE_UNROLL
  for (int e = 0; e < 2; ++e) two[e] = half(2, four[e], four[e + 2]);
  return half(1, two[0], two[1]);
}

VDCORE_DEVICE void add_weight_sums(float* to, int i, const float (&of)[8]) {
  const float sum = scattered_column_sum(of);
  float* const at = to + weight_sum_channel(i);
  store_shared(at, load_shared<float>(at) + sum);
}

// Adds up the warps of a block, whose sums lie one after another, into the block's row of the workspace (blocks, 4, D).
template <int C>
VDCORE_DEVICE void store_weight_sums(float* workspace, float* sums, int warps, int D) {
  sync_block();
  VDCORE_NO_UNROLL
  for (int i = static_cast<int>(thread_index()); i < 4 * D; i += 32 * warps) {
    const int part = i / D, channel = i - part * D;
    float total = 0;
    for (int warp = 0; warp < warps; ++warp) total += load_shared<float>(sums + 32 * C * (4 * warp + part) + channel);
    store_global(workspace + static_cast<int64_t>(block_index()) * 4 * D + i, total);
  }
}

// Rotates gradients of pairs of neighbouring channels back. `table`: as in norm_rope.
template <bool kWhole, bool kLayer, int C>
VDCORE_DEVICE void rope_backward(RowSums<C>& g, int h, bool live, const NormRope& how, int64_t table) {
  const AngleTable<kWhole, filled_chunks(C, kLayer)> angles(how, table, live);
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) {
    const Angles at = angles.chunk(i);
    unroll<4>([&](int j) { at.turn(g.x[i][j][2 * h], g.x[i][j][2 * h + 1], j, -1); });
  }
}

// Gradients g of normalized rows become those of the rows x, whose moments are m; adds to the weights' sums. Of a row
// that does not take part, x and g are 0; so are channels past the last one. kLayer: it may be layer norm.
template <typename E, bool kLayer, int C>
VDCORE_DEVICE void norm_backward(RowSums<C>& g, const Rows<C> (&x)[2], const RowMoments (&m)[2], const NormRope& how,
                                 const HeadNorm& norm, const WeightSums& sums, int D) {
  const bool layer = kLayer && how.kind == NormKind::layer;
  float total[2] = {0, 0}, along[2] = {0, 0};  // sums of w dy, and of w dy x^, both divided by the deviation
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) {
    if (sums.wanted && layer) {
      float db[8];
      unroll<8>([&](int e) { db[e] = g.x[i][e / 2][e % 2] + g.x[i][e / 2][2 + e % 2]; });
      add_weight_sums(sums.bias, i, db);
    }
    const int first = 32 * i + 8 * lane_column();
    const Float8 weight(norm.weight + first, norm.weight && has_channels(i, D), 1);
    float dw[8];
    unroll<8>([&](int e) { dw[e] = 0; });
    unroll<4, 2>([&](int j, int h) {
      const Float2 both = unpack<E>(x[h].x[i].x[j]);
      unroll<2>([&](int e) {
        float& d = g.x[i][j][2 * h + e];
        const float of_row = e ? both.hi : both.lo;
        dw[2 * j + e] = kLayer ? fmaf(d, m[h](of_row), dw[2 * j + e]) : fmaf(d * m[h].scale, of_row, dw[2 * j + e]);
        d *= m[h].scale;
        d *= weight[2 * j + e];
        along[h] = fmaf(d, kLayer ? m[h](of_row) : of_row, along[h]);
      });
    });
    if (sums.wanted) add_weight_sums(sums.weight, i, dw);
  }
  if (layer) unroll<C, 4, 2>([&](int i, int j, int h) { total[h] += g.x[i][j][2 * h] + g.x[i][j][2 * h + 1]; });
  const float each = reciprocal(static_cast<float>(D));
  unroll<2>([&](int h) {
    // x^ = x scale + shift; `along` is of x in place of x^ where there is no shift
    const float scale = m[h].scale, of_normalized = row_sum(along[h]) * each * (kLayer ? 1 : scale);
    const float slope = of_normalized * scale;
    const float constant = layer ? fmaf(of_normalized, m[h].shift, row_sum(total[h]) * each) : 0;
    unroll<C, 4>([&](int i, int j) {
      const Float2 both = unpack<E>(x[h].x[i].x[j]);
      unroll<2>([&](int e) {
        float& d = g.x[i][j][2 * h + e];
        d = fmaf(-slope, e ? both.hi : both.lo, kLayer ? d - constant : d);
      });
    });
  });
}

// Both, in their order. live[h]: the lane's row of half h takes part.
template <typename E, bool kLayer, bool kWhole, int C>
VDCORE_DEVICE void norm_rope_backward(RowSums<C>& g, const Rows<C> (&x)[2], const RowMoments (&m)[2],
                                      const bool (&live)[2], const int64_t (&table)[2], const NormRope& how,
                                      const HeadNorm& norm, const WeightSums& sums, int D) {
  unroll<2>([&](int h) { rope_backward<kWhole, kLayer>(g, h, live[h], how, table[h]); });
  if (how.kind != NormKind::none) norm_backward<E, kLayer>(g, x, m, how, norm, sums, D);
}

}  // namespace vdcore::cuda
