// Temporal attention forward of a long line: more than 32 keys, up to 128 channels.
//
// As temporal_attention.cuh, but a warp takes its line's keys 16 at a time, with the online softmax of FlashAttention-2
// (arXiv:2307.08691): the sums so far shrink where a larger score comes. One loop for any number of keys in place of
// registers for all scores: 4 C mma for scores, 4 C for sums and 16 C multiplications that shrink them per 16 keys.
//
//                              D <= 64     96    128
//   registers, q + sums             48     72     96
//   k and v of 16 keys              32     48     64
//   warps an SM                     16     12      8     (__launch_bounds__)
#pragma once

#include "cuda/core/sequences.cuh"

namespace vdcore::cuda {

constexpr int kTemporalThreads = 128;

struct TemporalForward {
  TemporalAttention a;
  int64_t items;  // warps' worth of work
  int32_t tiles;  // of 16 query rows a line
  bool packed;    // two lines a tile
};

inline void launch_temporal(const Where& where, void (*kernel)(TemporalForward), const TemporalForward& f) {
  const int64_t warps = kTemporalThreads / 32;
  launch(where, kernel, (f.items + warps - 1) / warps, kTemporalThreads, 0, f);
}

constexpr int temporal_long_blocks_per_sm(int C) { return 6 - C; }  // as many as without a spill

// E: element; C: chunks of 32 channels.
template <typename E, int C>
VDCORE_KERNEL(kTemporalThreads, temporal_long_blocks_per_sm(C))
temporal_long_forward_kernel(const TemporalForward f) {
  const TemporalAttention& a = f.a;
  const int64_t item = static_cast<int64_t>(block_index()) * (kTemporalThreads / 32) + thread_index() / 32;
  if (item >= f.items) return;
  const int D = a.head_dim, r = lane_row(), c = lane_column();
  const int64_t i_line = item / f.tiles;
  const int tile = static_cast<int>(item - i_line * f.tiles);
  const Line line = line_at(i_line, a.positions, a.heads);
  const int64_t length = valid_frames(a.frames, line.b);

  // Rows r and r + 8 of the tile.
  int frame[2];
  Seen seen[2];
  Rows<C> q[2];
  VDCORE_UNROLL
  for (int h = 0; h < 2; ++h) {
    frame[h] = 16 * tile + 8 * h + r;
    seen[h] = seen_by_query(a.frames, length, frame[h]);
    load_rows(q[h], a.q.row(line.b, frame[h], line.s, line.h), frame[h] < a.frames.queries, D);
  }

  const int32_t group = line.h / (a.heads / a.groups);
  const char* const k_row = a.k.row(line.b, r, line.s, group);
  const auto load_tile = [&](Rows<C>& rows, const char* row, int64_t step, int n) {
    load_rows(rows, row + 8 * n * step, 8 * n + r < a.frames.keys, D);
  };
  const auto visible = [&](int n, int h, int e) { return seen[h](8 * n + 2 * c + e); };
  const float factor = a.scale * kLog2E;
  float highest[2], total[2];  // total: of the lane's columns
  const auto weights = [&](int kk, uint32_t (&w)[4], RowSums<C>& sums) {
    float s[2][4];
    VDCORE_UNROLL
    for (int m = 0; m < 2; ++m) {
      s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0;
      Rows<C> k;
      load_tile(k, k_row, a.k.t, 2 * kk + m);
      inner_product<E>(s[m], q[0], q[1], k, D);
    }
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (kk == 0) highest[h] = -infinity(), total[h] = 0;
      float most = highest[h];
      VDCORE_UNROLL
      for (int m = 0; m < 2; ++m) VDCORE_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& x = s[m][2 * h + e];
        x = visible(2 * kk + m, h, e) ? x * factor : -infinity();
        most = maximum(most, x);
      }
      most = row_maximum(most);
      const float base = most == -infinity() ? 0 : most, shrink = exp2_approx(highest[h] - base);
      highest[h] = most;
      total[h] *= shrink;
      VDCORE_UNROLL
      for (int i = 0; i < C; ++i) VDCORE_UNROLL
      for (int j = 0; j < 4; ++j) sums.x[i][j][2 * h] *= shrink, sums.x[i][j][2 * h + 1] *= shrink;
      VDCORE_UNROLL
      for (int m = 0; m < 2; ++m) {
        const float lo = exp2_approx(s[m][2 * h] - base), hi = exp2_approx(s[m][2 * h + 1] - base);
        total[h] += lo + hi;
        w[h + 2 * m] = pack<E>(lo, hi);
      }
    }
  };
  seen_sums<E, 0, C>((a.frames.keys + 15) / 16 * 2, weights, a.v.row(line.b, r, line.s, group), a.frames.masked, D,
                     [&](Rows<C>& rows, const char* row, int n) { load_tile(rows, row, a.v.t, n); }, visible,
                     [&](const RowSums<C>& sums, const bool (&now)[2]) {
                       VDCORE_UNROLL
                       for (int h = 0; h < 2; ++h) {
                         const float all = row_sum(total[h]);
                         const bool mine = now[h] && frame[h] < a.frames.queries;
                         store_rows<E>(sums, h, all == 0 ? 0 : reciprocal(all),
                                       a.out.row(line.b, frame[h], line.s, line.h), mine, D);
                         if (a.lse && mine && c == 0) {
                           const float base = highest[h] == -infinity() ? 0 : highest[h];
                           store_global(a.lse + row_index(a, line, frame[h]), (base + log2_approx(all)) * (1 / kLog2E));
                         }
                       }
                     });
}

template <typename E>
void temporal_long_forward(const Where& where, const TemporalForward& f) {
  const int D = f.a.head_dim;
  if (D <= 64) return launch_temporal(where, temporal_long_forward_kernel<E, 2>, f);
  if (D <= 96) return launch_temporal(where, temporal_long_forward_kernel<E, 3>, f);
  launch_temporal(where, temporal_long_forward_kernel<E, 4>, f);
}

}  // namespace vdcore::cuda
