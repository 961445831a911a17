// Temporal attention backward, sm_80 and newer: one pass, no atomics, the same bits every time.
//
// All frames of a sequence are at hand, so probabilities are computed again from q and k, and neither the result nor
// its lse is read: q, k, v and dout in, dq, dk and dv out, 14 T D bytes per sequence. The warps of a sequence, 16 rows
// each, first take their rows as queries:
//   S = Q K^T, dP = dO V^T, P = softmax(S), delta = sum_k P dP - dlse, dS = P (dP - delta), dQ = dS K
// leave each row's lse and delta in shared memory (8 bytes per row), and then take their rows as keys:
//   S^T = K Q^T, dP^T = V dO^T, P^T and dS^T from those, dV = P^T dO, dK = dS^T Q
// Two products more than the least, in place of a transposition of P and dS through shared memory; what the second part
// reads was just read by the first one and is in L1.
//
// With norm or RoPE every warp first normalizes and rotates its own rows of q and k, once, and leaves them in shared
// memory, where all warps of the sequence read them; their backward is taken of the sums in registers, in float32.
//
//                                      T = 16, D = 72     T = 32, D = 128
//   registers, rows of two tensors         48                 64
//   scores and their gradients             16                 32
//   rows of the other side in flight       24 n               32 n
//   sums                                   48                 64
//   warps per SM                           12                  8
//   shared memory per block, KiB           31                 41      norm and RoPE: 64 rows of q and k, weight sums
//
// More frames, shared keys and wider heads: backward_long.cuh. 64 frames would fit here with 64 registers of scores,
// some of them spilled, for a quarter of this file's time to compile; no workload trains on as many.
#pragma once

#include "cuda/core/dispatch.h"
#include "cuda/temporal_attention/backward_side.cuh"

namespace vdcore::cuda {

struct TemporalBackward {
  TemporalAttentionBackward a;
  Sequences sequences;
  uint32_t items;  // sequences

  explicit TemporalBackward(const TemporalAttentionBackward& args)
      : a(args),
        sequences(args.forward.heads, args.forward.positions),
        items(static_cast<uint32_t>(args.forward.sequences)) {}
};

constexpr int kBackwardThreads = 128, kBackwardRows = kBackwardThreads / 32 * 16;  // of all sequences of a block
constexpr int temporal_backward_blocks_per_sm(int N, int C) { return N == 2 && C <= 3 ? 3 : 2; }
constexpr size_t temporal_backward_shared_bytes(int C, bool norm_rope) {
  const int rows = 2 * 64 * C * kBackwardRows, sums = kBackwardThreads / 32 * weight_sum_bytes(C);
  return 8 * kBackwardRows + (norm_rope ? rows + sums : 0);
}

// A warp of the kernel. N: tiles of 8 rows of either side; C: chunks of 32 channels; kNormRope: with norm or RoPE.
template <typename E, int N, int C, bool kNormRope>
struct BackwardWarp {
  static constexpr int kWarps = N / 2, kSequences = kBackwardThreads / 32 / kWarps;  // per sequence; per block
  const TemporalBackward& f;
  const TemporalAttentionBackward& g = f.a;
  const TemporalAttention& a = g.forward;
  const int D = a.head_dim, warp = static_cast<int>(thread_index() / 32);
  const uint32_t item = block_index() * kSequences + warp / kWarps;
  const SequenceTile tile{f.sequences.at(item < f.items ? item : 0), warp % kWarps, item < f.items};
  const int64_t length = valid_frames(a.frames, tile.sequence.b);
  const bool hides = a.frames.masked;
  const float factor = a.scale * kLog2E;
  // Of a block: q and k after norm and RoPE, weight sums of each warp; then lse and delta of each row.
  char* const q_rows = shared_memory() + warp / kWarps * (8 * N) * 64 * C;
  float* const block_sums = reinterpret_cast<float*>(shared_memory() + 2 * kBackwardRows * 64 * C);
  float* const warp_sums = block_sums + warp * (weight_sum_bytes(C) / 4);
  static constexpr int kStats = temporal_backward_shared_bytes(C, kNormRope) - 8 * kBackwardRows;
  Vec2* const stats = reinterpret_cast<Vec2*>(shared_memory() + kStats) + warp / kWarps * (8 * N);
  const BackwardSide queries = query_side(g, q_rows), keys = key_side(g, q_rows + kBackwardRows * 64 * C);
  // Scores, and products of gradients with values, of the warp's rows with all rows of the other side.
  float s[N][4], dp[N][4];

  VDCORE_DEVICE explicit BackwardWarp(const TemporalBackward& f) : f(f) {}

  // Of the lane's first row among those of its sequences.
  VDCORE_DEVICE int row() const { return 16 * (warp % kWarps) + lane_row(); }

  VDCORE_DEVICE void load_own(Rows<C> (&rows)[2], const Tokens& x, int count) const {
    unroll<2>([&](int h) { load_rows(rows[h], tile.row(x, h), tile.has(h, count), D); });
  }
  VDCORE_DEVICE void load_own_scored(Rows<C> (&rows)[2], const BackwardSide& side) const {
    if constexpr (kNormRope) {
      unroll<2>([&](int h) { load_shared_row(rows[h], side.rows, row() + 8 * h); });
    } else {
      load_own(rows, side.scored, side.count);
    }
  }
  VDCORE_DEVICE void load_scored(Rows<C>& rows, const BackwardSide& side, const char*& next, int n) const {
    if constexpr (kNormRope)
      load_shared_row(rows, side.rows, 8 * n + lane_row());
    else
      tile.load_other(rows, side.scored, next, n, side.count, D);
  }

  VDCORE_DEVICE void products(const BackwardSide& own, const BackwardSide& other) {
    Rows<C> x[2], y[2];
    load_own_scored(x, own);
    load_own(y, own.other, own.count);
    const char *next_x = tile.first_other(other.scored), *next_y = tile.first_other(other.other);
    unroll<N>([&](int n) {
      unroll<4>([&](int e) { s[n][e] = dp[n][e] = 0; });
      Rows<C> x_tile, y_tile;
      load_scored(x_tile, other, next_x, n);
      tile.load_other(y_tile, other.other, next_y, n, other.count, D);
      inner_product<E>(s[n], x[0], x[1], x_tile, D);
      inner_product<E>(dp[n], y[0], y[1], y_tile, D);
    });
  }

  // Sums of scored rows of the other side: the gradient of the warp's own.
  VDCORE_DEVICE void scored_gradient(const uint32_t (&weights)[N / 2][4], const BackwardSide& own,
                                     const BackwardSide& other, const Seen (&seen)[2]) const {
    seen_sums<E, N, C>(
        weights, tile.first_other(other.scored), hides, D,
        [&](Rows<C>& rows, const char*& next, int n) { load_scored(rows, other, next, n); },
        [&](int n, int h, int e) { return tile.sees(seen, n, h, e); },
        [&](RowSums<C>& sums, const bool (&now)[2]) {
          store_gradient<E, kNormRope>(sums, own, tile, seen, now, a.norm_rope, warp_sums, g.sums != nullptr, D);
        });
  }

  VDCORE_DEVICE void stage() const {
    if (g.sums) clear_weight_sums<C>(warp_sums);
    stage_tile<E, C, kNormRope>(queries, tile, a.norm_rope, row(), D);
    stage_tile<E, C, kNormRope>(keys, tile, a.norm_rope, row(), D);
  }

  // dq; leaves lse and delta of the rows.
  VDCORE_DEVICE void query_gradients() {
    Seen seen[2];
    unroll<2>([&](int h) { seen[h] = seen_by_query(a.frames, length, tile.frame[h]); });
    const auto visible = [&](int n, int h, int e) { return tile.sees(seen, n, h, e); };
    products(queries, keys);
    uint32_t ds[N / 2][4];
    unroll<2>([&](int h) {
      float highest = -infinity(), delta = 0;
      const float base = exponentials(s, h, factor, highest, visible), total = row_sum(add_columns(0, s, h));
      unroll<N, 2>([&](int n, int e) {
        if (visible(n, h, e)) delta += s[n][2 * h + e] * dp[n][2 * h + e];
      });
      const float each = inverse(total);
      delta = row_sum(delta) * each;
      if (g.dlse && tile.has(h, queries.count))
        delta -= load_global<float>(g.dlse + row_index(a, tile.sequence, tile.frame[h]));
      unroll<N>([&](int n) {
        float dx[2];
        unroll<2>([&](int e) {
          dx[e] = visible(n, h, e) ? s[n][2 * h + e] * each * (dp[n][2 * h + e] - delta) * a.scale : 0;
        });
        ds[n / 2][h + n % 2 * 2] = pack<E>(dx[0], dx[1]);
      });
      if (lane_column() == 0) store_shared(stats + row() + 8 * h, Float2{base + log2_approx(total), delta});
    });
    scored_gradient(ds, queries, keys, seen);
  }

  // dv and dk, from what all warps have left.
  VDCORE_DEVICE void key_gradients() {
    Seen seen[2];
    unroll<2>([&](int h) { seen[h] = seen_by_key(a.frames, length, tile.frame[h]); });
    const auto visible = [&](int n, int h, int e) { return tile.sees(seen, n, h, e); };
    products(keys, queries);
    uint32_t p[N / 2][4], ds[N / 2][4];
    unroll<N>([&](int n) {
      Float2 of[2];  // lse and delta of the two columns
      unroll<2>([&](int e) { of[e] = load_shared<Float2>(stats + 8 * n + 2 * lane_column() + e); });
      unroll<2>([&](int h) {
        float x[2], dx[2];
        unroll<2>([&](int e) {
          const bool sees = visible(n, h, e);
          x[e] = sees ? exp2_approx(s[n][2 * h + e] * factor - of[e].lo) : 0;
          dx[e] = sees ? x[e] * (dp[n][2 * h + e] - of[e].hi) * a.scale : 0;
        });
        p[n / 2][h + n % 2 * 2] = pack<E>(x[0], x[1]);
        ds[n / 2][h + n % 2 * 2] = pack<E>(dx[0], dx[1]);
      });
    });
    seen_sums<E, N, C>(
        p, tile.first_other(g.dout), hides, D,
        [&](Rows<C>& rows, const char*& next, int n) { tile.load_other(rows, g.dout, next, n, queries.count, D); },
        visible,
        [&](const RowSums<C>& sums, const bool (&now)[2]) {
          store_tile<E>(sums, {1, 1}, g.dv, tile,
                        {now[0] && tile.has(0, keys.count), now[1] && tile.has(1, keys.count)}, D);
        });
    scored_gradient(ds, keys, queries, seen);
  }
};

template <typename E, int N, int C, bool kNormRope>
VDCORE_KERNEL(kBackwardThreads, temporal_backward_blocks_per_sm(N, C))
temporal_backward_kernel(const TemporalBackward f) {
  BackwardWarp<E, N, C, kNormRope> warp(f);
  if constexpr (kNormRope) {
    warp.stage();
    sync_block();
  }
  warp.query_gradients();
  sync_block();
  warp.key_gradients();
  if constexpr (kNormRope)
    if (f.a.sums) store_weight_sums<C>(f.a.sums, warp.block_sums, kBackwardThreads / 32, warp.D);
}

template <typename E, int N, int C, bool kNormRope>
void temporal_backward_kernel_of(const Where& where, const TemporalBackward& f) {
  constexpr int kSequences = BackwardWarp<E, N, C, kNormRope>::kSequences;
  launch<temporal_backward_kernel<E, N, C, kNormRope>>(where,
                                                       {(int64_t{f.items} + kSequences - 1) / kSequences,
                                                        kBackwardThreads, temporal_backward_shared_bytes(C, kNormRope)},
                                                       f);
}

template <typename E, int N>
void temporal_backward(const Where& where, const TemporalBackward& f) {
  with_chunks<2, 3, 4>(where, f.a.forward.head_dim, [&](auto chunks) {
    constexpr int C = decltype(chunks)::value;
    if (f.a.forward.norm_rope.any()) return temporal_backward_kernel_of<E, N, C, true>(where, f);
    temporal_backward_kernel_of<E, N, C, false>(where, f);
  });
}

template <typename E>
void temporal_attention_backward_of(const Where& where, const TemporalAttentionBackward& args) {
  const TemporalAttention& a = args.forward;
  const int frames = a.frames.queries > a.frames.keys ? a.frames.queries : a.frames.keys, D = a.head_dim;
  const int shared = a.heads / a.groups;
  if (a.sequences >= int64_t{1} << 31) launch_error(where, "2147483648 sequences or more");
  if (!temporal_backward_fits(a.frames.queries, a.frames.keys, D, shared, most_shared_memory(where)))
    launch_error(where, "no kernel for so many frames and channels");
  if (a.norm_rope.any() && !temporal_backward_fuses_norm_rope(D))
    launch_error(where, "no kernel for such norm or rope");
  if (!temporal_backward_is_short(frames, D, shared)) return temporal_long_backward<E>(where, args);
  const TemporalBackward f(args);
  if (frames <= 16) return temporal_backward<E, 2>(where, f);
  temporal_backward<E, 4>(where, f);
}

}  // namespace vdcore::cuda
