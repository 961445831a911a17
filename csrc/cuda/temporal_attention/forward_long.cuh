// Temporal attention forward of a long sequence: more than 32 keys, up to 128 channels.
//
// As forward.cuh, but a warp takes its sequence's keys 16 at a time, with the online softmax of FlashAttention-2
// (arXiv:2307.08691): the sums so far shrink where a larger score comes. One loop for any number of keys in place of
// registers for all scores: 4 C mma for scores, 4 C for sums and 16 C multiplications that shrink them per 16 keys.
//
//                              D <= 64     96    128
//   registers, q + sums             48     72     96
//   k and v of 16 keys              32     48     64
//   warps per SM                    16     12      8     (__launch_bounds__)
#pragma once

#include "cuda/core/dispatch.h"
#include "cuda/temporal_attention/sequences.cuh"

namespace vdcore::cuda {

constexpr int kTemporalThreads = 128;

struct TemporalForward {
  TemporalAttention a;
  Sequences sequences;
  Divider tiles;   // of 16 query rows, per sequence
  Divider shared;  // query heads per key head
  SeenFrames seen;
  uint32_t items;  // warps' worth of work

  TemporalForward(const Where& where, const TemporalAttention& a)
      : a(a),
        sequences(a.heads, a.positions),
        tiles((a.frames.queries + 15) / 16),
        shared(a.heads / a.groups),
        seen(a.frames) {
    const int64_t all = a.sequences * tiles.divisor;
    if (all >= int64_t{1} << 31) launch_error(where, "2147483648 tiles of 16 frames or more");
    items = static_cast<uint32_t>(all);
  }
};

template <void (*kKernel)(TemporalForward)>
void launch_temporal(const Where& where, const TemporalForward& f, size_t shared_bytes = 0) {
  const int64_t warps = kTemporalThreads / 32;
  launch<kKernel>(where, {(int64_t{f.items} + warps - 1) / warps, kTemporalThreads, shared_bytes}, f);
}

constexpr int temporal_long_blocks_per_sm(int C) { return C == 4 ? 2 : 3; }  // as many as without a spill

// E: element; C: chunks of 32 channels.
template <typename E, int C>
VDCORE_KERNEL(kTemporalThreads, temporal_long_blocks_per_sm(C))
temporal_long_forward_kernel(const TemporalForward f) {
  const TemporalAttention& a = f.a;
  uint32_t item = block_index() * (kTemporalThreads / 32) + thread_index() / 32;
  if (item >= f.items) return;
  const int D = a.head_dim, r = lane_row();
  const auto of_sequence = static_cast<int>(f.tiles.split(item));
  const Sequence at = f.sequences.at(item);
  const Sequence of_keys{at.b, at.s, f.shared.quotient(at.h)};
  const SequenceTile tile(at, of_sequence);
  const int64_t length = valid_frames(a.frames, at.b);

  Seen seen[2];
  bool valid[2];
  Rows<C> q[2];
  unroll<2>([&](int h) {
    valid[h] = tile.has(h, a.frames.queries);
    seen[h] = seen_by_query(a.frames, length, tile.frame[h]);
    load_rows(q[h], tile.row(a.q, h), valid[h], D);
  });
  const auto visible = [&](int n, int h, int e) { return tile.sees(seen, n, h, e); };
  const char* const k_row = of_keys.row(a.k, r);
  const auto load_tile = [&](Rows<C>& rows, const char* row, int64_t step, int n) {
    load_rows(rows, row + 8 * n * step, 8 * n + r < a.frames.keys, D);
  };

  float highest[2], total[2];  // total: of the lane's columns
  const auto weights = [&](int kk, uint32_t (&w)[4], auto& sums) {
    float s[2][4];
    unroll<2>([&](int m) {
      s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0;
      Rows<C> k;
      load_tile(k, k_row, a.k.t, 2 * kk + m);
      inner_product<E>(s[m], q[0], q[1], k, D);
    });
    unroll<2>([&](int h) {
      if (kk == 0) highest[h] = -infinity(), total[h] = 0;
      const float before = highest[h];
      const float base = exponentials(s, h, a.scale * kLog2E, highest[h],
                                      [&](int m, int half, int e) { return visible(2 * kk + m, half, e); });
      const float shrink = exp2_approx(before - base);
      total[h] *= shrink;
      for_sums(sums, [&](float (&x)[4]) { x[2 * h] *= shrink, x[2 * h + 1] *= shrink; });
      unroll<2>([&](int m) {
        total[h] += s[m][2 * h] + s[m][2 * h + 1];
        w[h + 2 * m] = pack<E>(s[m][2 * h], s[m][2 * h + 1]);
      });
    });
  };
  const char* const v_row = of_keys.row(a.v, r);
  RowSums<C> sums;
  seen_sums<E, 0>(
      sums, (a.frames.keys + 15) / 16 * 2, weights, a.frames.masked, D,
      [&](Rows<C>& rows, int n) { load_tile(rows, v_row, a.v.t, n); },
      [&](int n, int i) { return load_chunk(v_row + 8 * n * a.v.t, i, 8 * n + r < a.frames.keys, D); }, visible);
  const float all[2] = {row_sum(total[0]), row_sum(total[1])};
  store_tile<E>(sums, {inverse(all[0]), inverse(all[1])}, a.out, tile, a.frames.queries, D);
  if (!a.lse || lane_column() != 0) return;
  unroll<2>([&](int h) {
    if (valid[h]) store_global(a.lse + row_index(a, at, tile.frame[h]), log_sum(highest[h], all[h]));
  });
}

template <typename E>
void temporal_long_forward(const Where& where, const TemporalForward& f) {
  with_chunks<2, 3, 4>(where, f.a.head_dim, [&](auto chunks) {
    launch_temporal<temporal_long_forward_kernel<E, decltype(chunks)::value>>(where, f);
  });
}

}  // namespace vdcore::cuda
