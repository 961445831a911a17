// Temporal attention backward, sm_80 and newer: one pass, no atomics, the same bits every time.
//
// All frames of a sequence are at hand, so probabilities are computed again from q and k, and neither the result nor
// its lse is read: q, k, v and dout in, dq, dk and dv out, 14 T D bytes per sequence. A warp takes 16 query rows,
//   S = Q K^T, dP = dO V^T, P = softmax(S), delta = sum_k P dP - dlse, dS = P (dP - delta), dQ = dS K
// and then the same 16 rows as keys,
//   dV = P^T dO, dK = dS^T Q
// with P and dS transposed, rounded as they are multiplied: blocks of 8 x 8 within the warp, and through shared memory,
// 1 KiB a warp and side, where a sequence has two.
//
// With norm or RoPE every warp first normalizes and rotates its own rows of q and k, once, and leaves them in shared
// memory, for the other warp of the sequence and to free registers; their backward is taken of the sums in registers,
// in float32.
//
//                                      T = 16, D = 72     T = 32, D = 128
//   registers, rows                        96                 64 + 32 n    (n: tiles of the other side in flight)
//   scores and their gradients             16                 32
//   sums                                   48                 64
//   warps per SM                           12                  8
//   shared memory per block, KiB            0                  8
//     with norm and RoPE                   30                 48           64 rows of q and k, weight sums
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
  SeenFrames seen;

  explicit TemporalBackward(const TemporalAttentionBackward& args)
      : a(args),
        sequences(args.forward.heads, args.forward.positions),
        items(static_cast<uint32_t>(args.forward.sequences)),
        seen(args.forward.frames) {}
};

constexpr int kBackwardThreads = 128, kBackwardRows = kBackwardThreads / 32 * 16;  // of all sequences of a block
constexpr int temporal_backward_blocks_per_sm(int N, int C) { return C == 2 || (N == 2 && C == 3) ? 3 : 2; }

// Shared memory of a block, in this order: weights of pairs for the other warp of a sequence; q and k after norm and
// RoPE; weight sums of each warp.
constexpr int pair_bytes(int N) { return N == 2 ? 0 : 4 * N * N * 64; }  // a sequence's: P and dS
constexpr int pair_bytes_of_block(int N) { return pair_bytes(N) * kBackwardThreads / 32 / (N / 2); }
constexpr int scored_bytes(int C) { return 64 * C * kBackwardRows; }  // q's, or k's
constexpr size_t temporal_backward_shared_bytes(int N, int C, bool norm_rope) {
  const int sums = kBackwardThreads / 32 * weight_sum_bytes(C);
  return pair_bytes_of_block(N) + (norm_rope ? 2 * scored_bytes(C) + sums : 0);
}

// A warp of the kernel. N: tiles of 8 rows of either side; C: chunks of 32 channels.
template <typename E, int N, int C, Fused kFused>
struct BackwardWarp {
  static constexpr bool kNormRope = kFused != Fused::none;
  static constexpr int kWarps = N / 2, kSequences = kBackwardThreads / 32 / kWarps;  // per sequence; per block
  static constexpr bool kAlone = kWarps == 1;          // a warp's rows are all of its sequence's
  static constexpr bool kHeld = kAlone && !kNormRope;  // and stay in registers
  const TemporalBackward& f;
  const TemporalAttentionBackward& g = f.a;
  const TemporalAttention& a = g.forward;
  const int D = a.head_dim, warp = static_cast<int>(thread_index() / 32), of_sequence = warp % kWarps;
  const uint32_t item = block_index() * kSequences + warp / kWarps;
  const SequenceTile tile{f.sequences.at(item < f.items ? item : 0), of_sequence, item < f.items};
  char* const pairs = shared_memory() + warp / kWarps * pair_bytes(N);
  char* const q_rows = shared_memory() + pair_bytes_of_block(N) + warp / kWarps * (8 * N) * 64 * C;
  float* const block_sums = reinterpret_cast<float*>(shared_memory() + pair_bytes_of_block(N) + 2 * scored_bytes(C));
  float* const warp_sums = block_sums + warp * (weight_sum_bytes(C) / 4);
  const BackwardSide queries = query_side(g, q_rows), keys = key_side(g, q_rows + scored_bytes(C));
  const SeenByRows seen_by_queries = tile.seen_by_queries(f.seen, a.frames);
  Rows<C> q[2], dout[2], k[2], v[2];  // the warp's rows; of keys and values where it is alone
  RowMoments q_moments[2], k_moments[2];
  // Weights of pairs, 16 columns after 16 columns, of the warp's queries and of its keys.
  uint32_t p[N / 2][4], ds[N / 2][4], p_of_keys[N / 2][4], ds_of_keys[N / 2][4];

  VDCORE_DEVICE explicit BackwardWarp(const TemporalBackward& f) : f(f) {}

  VDCORE_DEVICE void load_own(Rows<C> (&rows)[2], const Tokens& x, int count) const {
    unroll<2>([&](int h) { load_rows(rows[h], tile.row(x, h), tile.has(h, count), D); });
  }
  // Of its sequence's rows in shared memory.
  VDCORE_DEVICE int own_row(int h) const { return 16 * of_sequence + 8 * h + lane_row(); }
  VDCORE_DEVICE void stage(const Rows<C> (&rows)[2], const BackwardSide& side) const {
    unroll<2>([&](int h) { store_shared_row(side.rows, own_row(h), rows[h]); });
  }

  VDCORE_DEVICE void load() {
    load_own(q, a.q, a.frames.queries);
    if constexpr (kHeld || kNormRope) load_own(k, a.k, a.frames.keys);
    if constexpr (kNormRope) {
      // One after the other: ptxas loads the angles of both sides at once else, and the values, and spills.
      norm_tile<E, kFused>(q, q_moments, queries, tile, a.norm_rope, D);
      stage(q, queries);
      sync_warp();
      norm_tile<E, kFused>(k, k_moments, keys, tile, a.norm_rope, D);
      stage(k, keys);
      kAlone ? sync_warp() : sync_block();
      unroll<2>([&](int h) { load_shared_row(q[h], q_rows, own_row(h)); });  // no registers in between
    }
    load_own(dout, g.dout, a.frames.queries);
    if constexpr (kAlone) load_own(v, a.v, a.frames.keys);
  }

  // Tile n of a side's scored rows, and its chunk i; `own`: the warp's.
  VDCORE_DEVICE void load_scored(Rows<C>& rows, const BackwardSide& side, const Rows<C> (&own)[2], int n) const {
    if constexpr (kHeld)
      rows = own[n];
    else if constexpr (kNormRope)
      load_shared_row(rows, side.rows, 8 * n + lane_row());
    else
      tile.load_other(rows, side.scored, n, side.count, D);
  }
  VDCORE_DEVICE Vec4 scored_chunk(const BackwardSide& side, const Rows<C> (&own)[2], int n, int i) const {
    if constexpr (kHeld)
      return chunk_of(own[n], i);
    else if constexpr (kNormRope)
      return load_shared<Vec4>(shared_chunk<C>(side.rows, 8 * n + lane_row(), i));
    else
      return tile.load_other_chunk(side.scored, n, i, side.count, D);
  }
  VDCORE_DEVICE void load_unscored(Rows<C>& rows, const Tokens& x, const Rows<C> (&own)[2], int n, int count) const {
    if constexpr (kAlone)
      rows = own[n];
    else
      tile.load_other(rows, x, n, count, D);
  }

  // P and dS of the warp's queries.
  VDCORE_DEVICE void weigh() {
    float s[N][4], dp[N][4];
    unroll<N>([&](int n) {
      unroll<4>([&](int e) { s[n][e] = dp[n][e] = 0; });
      Rows<C> k_tile, v_tile;
      load_scored(k_tile, keys, k, n);
      load_unscored(v_tile, a.v, v, n, a.frames.keys);
      inner_product<E>(s[n], q[0], q[1], k_tile, D);
      inner_product<E>(dp[n], dout[0], dout[1], v_tile, D);
    });
    const SeenByRows& visible = seen_by_queries;
    unroll<2>([&](int h) {
      float highest = -infinity(), delta = 0;
      exponentials(s, h, a.scale * kLog2E, highest, visible);
      const float each = inverse(row_sum(add_columns(0, s, h)));
      unroll<N, 2>([&](int n, int e) {
        if (visible(n, h, e)) delta = fmaf(s[n][2 * h + e], dp[n][2 * h + e], delta);
      });
      delta = row_sum(delta) * each;
      if (g.dlse && tile.has(h, a.frames.queries))
        delta -= load_global<float>(g.dlse + row_index(a, tile.sequence, tile.frame[h]));
      unroll<N>([&](int n) {
        float x[2], dx[2];
        unroll<2>([&](int e) {
          const float weight = s[n][2 * h + e] * each, dweight = fmaf(dp[n][2 * h + e], a.scale, -delta * a.scale);
          x[e] = visible(n, h, e) ? weight : 0;
          dx[e] = visible(n, h, e) ? weight * dweight : 0;
        });
        p[n / 2][h + n % 2 * 2] = pack<E>(x[0], x[1]);
        ds[n / 2][h + n % 2 * 2] = pack<E>(dx[0], dx[1]);
      });
    });
  }

  // From pairs of the warp's queries with all keys to those of its keys with all queries: blocks of 8 x 8 are
  // transposed, and change warps through shared memory where a sequence has two.
  VDCORE_DEVICE void transpose_pairs() {
    const auto transpose = [](uint32_t (&to)[4], const uint32_t (&w)[4]) {
      unroll<4>([&](int i) { to[i] = transpose8x8(w[i % 2 * 2 + i / 2]); });
    };
    unroll<N / 2>([&](int kk) { transpose(p_of_keys[kk], p[kk]), transpose(ds_of_keys[kk], ds[kk]); });
    if constexpr (kAlone) return;
    const auto place = [&](int of_keys, int of_queries) {
      return pairs + (of_keys * kWarps + of_queries) * 1024 + static_cast<int>(thread_index() % 32) * 16;
    };
    const auto whole = [](const uint32_t (&w)[4]) { return Vec4{{w[0], w[1], w[2], w[3]}}; };
    unroll<N / 2>([&](int kk) {
      char* const to = place(kk, of_sequence);
      store_shared(to, whole(p_of_keys[kk]));
      store_shared(to + 512, whole(ds_of_keys[kk]));
    });
    sync_block();
    unroll<N / 2>([&](int kk) {
      const char* const from = place(of_sequence, kk);
      const auto x = load_shared<Vec4>(from), dx = load_shared<Vec4>(from + 512);
      unroll<4>([&](int i) { p_of_keys[kk][i] = x.x[i], ds_of_keys[kk][i] = dx.x[i]; });
    });
  }

  // Sums of the other side's scored rows by dS: the gradient of the warp's own.
  VDCORE_DEVICE void scored_gradient(const uint32_t (&weights)[N / 2][4], const BackwardSide& own,
                                     const BackwardSide& other, const Rows<C> (&rows)[2], const RowMoments (&m)[2],
                                     const SeenByRows& visible) const {
    RowSums<C> sums;
    seen_sums<E, N>(
        sums, N, GivenWeights<N>{weights}, a.frames.masked, D,
        [&](Rows<C>& x, int n) { load_scored(x, other, rows, n); },
        [&](int n, int i) { return scored_chunk(other, rows, n, i); }, visible);
    store_gradient<E, kFused>(sums, own, tile, m, {visible.any(0), visible.any(1)}, a.norm_rope, warp_sums,
                              g.sums != nullptr, D);
  }

  VDCORE_DEVICE void run() {
    load();
    weigh();
    transpose_pairs();
    const SeenByRows visible = tile.seen_by_keys(f.seen, a.frames);
    RowSums<C> sums;
    seen_sums<E, N>(
        sums, N, GivenWeights<N>{p_of_keys}, a.frames.masked, D,
        [&](Rows<C>& x, int n) { load_unscored(x, g.dout, dout, n, a.frames.queries); },
        [&](int n, int i) { return tile.load_other_chunk(g.dout, n, i, a.frames.queries, D); }, visible);
    store_tile<E>(sums, {1, 1}, g.dv, tile, a.frames.keys, D);
    if constexpr (kNormRope)
      if (g.sums) clear_weight_sums<C>(warp_sums);
    scored_gradient(ds, queries, keys, k, q_moments, seen_by_queries);
    scored_gradient(ds_of_keys, keys, queries, q, k_moments, visible);
    if constexpr (kNormRope)
      if (g.sums) store_weight_sums<C>(g.sums, block_sums, kBackwardThreads / 32, D);
  }
};

template <typename E, int N, int C, Fused kFused>
VDCORE_KERNEL(kBackwardThreads, temporal_backward_blocks_per_sm(N, C))
temporal_backward_kernel(const TemporalBackward f) {
  BackwardWarp<E, N, C, kFused>(f).run();
}

template <typename E, int N, int C, Fused kFused>
void temporal_backward_kernel_of(const Where& where, const TemporalBackward& f) {
  constexpr int kSequences = BackwardWarp<E, N, C, kFused>::kSequences;
  launch<temporal_backward_kernel<E, N, C, kFused>>(where,
                                                    {(int64_t{f.items} + kSequences - 1) / kSequences, kBackwardThreads,
                                                     temporal_backward_shared_bytes(N, C, kFused != Fused::none)},
                                                    f);
}

template <typename E, int N>
void temporal_backward(const Where& where, const TemporalBackward& f) {
  const NormRope& how = f.a.forward.norm_rope;
  if (how.kind == NormKind::layer) return temporal_backward_kernel_of<E, N, kLayerNormChunks, Fused::layer>(where, f);
  with_chunks<2, 3, 4>(where, f.a.forward.head_dim, [&](auto chunks) {
    constexpr int C = decltype(chunks)::value;
    if (how.any()) return temporal_backward_kernel_of<E, N, C, Fused::rms>(where, f);
    temporal_backward_kernel_of<E, N, C, Fused::none>(where, f);
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
  check_table(where, a);
  if (!temporal_backward_is_short(frames, D, shared)) return temporal_long_backward<E>(where, args);
  const TemporalBackward f(args);
  if (frames <= 16) return temporal_backward<E, 2>(where, f);
  temporal_backward<E, 4>(where, f);
}

}  // namespace vdcore::cuda
