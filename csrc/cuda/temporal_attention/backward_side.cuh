// What both backward kernels do with one side of a sequence, its queries or its keys.
#pragma once

#include "cuda/qk_norm_rope/norm_rope_backward.cuh"
#include "cuda/temporal_attention/sequences.cuh"

namespace vdcore::cuda {

struct BackwardSide {
  const Tokens &scored, &other, &gradient;  // q, dout and dq, or k, v and dk
  char* rows;                               // after norm and RoPE, in shared memory
  int count;                                // frames
  const HeadNorm& norm;
  int64_t start;  // row of the table of frame 0
  bool keys;
};
VDCORE_DEVICE BackwardSide query_side(const TemporalAttentionBackward& g, char* rows) {
  const TemporalAttention& a = g.forward;
  return {a.q, g.dout, g.dq, rows, a.frames.queries, a.norm_rope.q, a.frames.start, false};
}
VDCORE_DEVICE BackwardSide key_side(const TemporalAttentionBackward& g, char* rows) {
  const TemporalAttention& a = g.forward;
  return {a.k, a.v, g.dk, rows, a.frames.keys, a.norm_rope.k, 0, true};
}

// Norm and RoPE of the tile's rows, whose moments become m.
template <typename E, Fused kFused, int C>
VDCORE_DEVICE void norm_tile(Rows<C> (&x)[2], RowMoments (&m)[2], const BackwardSide& side, const SequenceTile& tile,
                             const NormRope& how, int D) {
  const bool there[2] = {tile.has(0, side.count), tile.has(1, side.count)};
  const int64_t table[2] = {tile.angles(how, side.start, 0, side.count), tile.angles(how, side.start, 1, side.count)};
  moments<E, kFused == Fused::layer>(m, x, there, how.kind, how.eps, D);
  norm_rope<E, kFused == Fused::layer, true>(x, m, there, how, side.norm, table, D);
}

// The tile's rows, after norm and RoPE, to shared memory; `row`: where the lane's first one goes.
template <typename E, int C, Fused kFused>
VDCORE_DEVICE void stage_tile(const BackwardSide& side, const SequenceTile& tile, const NormRope& how, int row, int D) {
  Rows<C> x[2];
  unroll<2>([&](int h) { load_rows(x[h], tile.row(side.scored, h), tile.has(h, side.count), D); });
  if constexpr (kFused != Fused::none) {
    RowMoments m[2];
    if (how.any()) norm_tile<E, kFused>(x, m, side, tile, how, D);
  }
  unroll<2>([&](int h) { store_shared_row(side.rows, row + 8 * h, x[h]); });
}

// Stores the gradients of the tile's scored rows, through the backward of norm and RoPE. m: the rows' moments, or null;
// sees[h]: the row of half h sees a frame. `weight_sums`: of the warp, if they are wanted.
template <typename E, Fused kFused, int C>
VDCORE_DEVICE void store_gradient(RowSums<C>& sums, const BackwardSide& own, const SequenceTile& tile,
                                  const RowMoments* m, const bool (&sees)[2], const NormRope& how, float* weight_sums,
                                  bool wanted, int D) {
  if constexpr (kFused != Fused::none) {
    constexpr bool kLayer = kFused == Fused::layer;
    Rows<C> x[2];
    bool live[2];
    int64_t table[2];
    RowMoments of[2];
    SequenceTile again = tile;  // where rows and angles are was known before, and would be a register or two too many
    unroll<2>([&](int h) { forget(again.frame[h]); });
    unroll<2>([&](int h) {
      live[h] = tile.has(h, own.count) && sees[h];
      load_rows(x[h], again.row(own.scored, h), live[h], D);
      table[h] = again.angles(how, own.start, h, own.count);
      if (m) of[h] = live[h] ? m[h] : RowMoments{0, 0};
    });
    if (!m) moments<E, kLayer>(of, x, live, how.kind, how.eps, D);
    if (how.any())
      norm_rope_backward<E, kLayer, true>(sums, x, of, live, table, how, own.norm,
                                          weight_sums_of<C>(weight_sums, own.keys, wanted), D);
  }
  store_tile<E>(sums, {1, 1}, own.gradient, tile, own.count, D);
}

}  // namespace vdcore::cuda
