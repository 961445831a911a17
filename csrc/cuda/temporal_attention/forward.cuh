// Temporal attention forward, sm_80 and newer.
//
// A sequence is one (position, head): T rows of D channels, H * D * S channels apart. The work is T / 2 operations per
// byte, so time is bytes: q, k and v in, out out, 8 * T * D per sequence. A warp takes 16 query rows of a sequence and
// all keys at once, and keeps them in registers; nothing is staged in shared memory, but keys that two warps would
// normalize twice, so what limits bytes in flight is registers alone:
//
//                       T = 16, D = 72     T = 32, D = 128
//   registers, q + k + v    24 + 24 + 24       32 + 64 + 64
//   scores, sums             8 + 48            16 + 64
//   warps per SM                 16                   8      (__launch_bounds__)
//   loads in flight, KiB        144                 160      (an SM needs about 36 at 4.8 TB/s)
//
// Where norm and RoPE join, keys come behind queries and values behind scores: then issue slots bound it.
//
// Heads of a position lie side by side in memory and are taken by neighbouring warps, so that the pieces of 64 bytes
// that a load touches of a row make up whole L2 lines. Warps of the same sequence read its keys from L1 after the first
// one. Up to 32 keys take one pass: the softmax knows its whole row before the first product with v. More keys, which
// no released model has: forward_long.cuh.
//
// Instantiated for 16 and 32 keys and 64, 96, 128 and 256 channels: models have 16 to 32 frames (2 and 4 tiles of keys)
// and heads of 40, 64 (64), 72, 80 (96), 128 and 160 (256) channels. Channels past D are never loaded, only multiplied,
// which a kernel that waits for memory does not feel. Nothing spills (tests/build/test_cuda_code.py). Which frames see
// which is a bit each, found by the launcher: tests of pairs are one instruction, and the same with and without a mask.
#pragma once

#include "cuda/core/dispatch.h"
#include "cuda/qk_norm_rope/norm_rope.cuh"
#include "cuda/temporal_attention/forward_long.cuh"

namespace vdcore::cuda {

// Chosen so that nothing spills: ptxas takes what it may for loads in flight.
constexpr int temporal_blocks_per_sm(int N, int C, bool norm_rope) {
  if (C <= 3) return norm_rope && (C == 3 || N == 4) ? 3 : 4;
  return N == 2 && C == 4 && !norm_rope ? 3 : 2;
}

// What is loaded before the first product, beside the queries: tiles of keys at once, and whether all values, too.
constexpr int held_keys(int N, int C, bool norm_rope) {
  return N * C <= 8 || (N * C <= 16 && !norm_rope && C != 3) ? N : 2;
}
constexpr bool holds_values(int N, int C, bool norm_rope) { return !norm_rope && C <= 4 && N * C != 12; }

// Keys after norm and RoPE in shared memory: where a sequence has two warps, each of them normalizes one half.
constexpr bool stages_keys(int N, bool norm_rope) { return N == 4 && norm_rope; }
constexpr int staged_bytes(int N, int C) { return 8 * N * 64 * C; }  // of a sequence

// E: element; N: tiles of 8 keys; C: chunks of 32 channels.
template <typename E, int N, int C, Fused kFused>
VDCORE_KERNEL(kTemporalThreads, temporal_blocks_per_sm(N, C, kFused != Fused::none))
temporal_forward_kernel(const TemporalForward f) {
  constexpr bool kNormRope = kFused != Fused::none, kLayer = kFused == Fused::layer;
  constexpr int kKeys = held_keys(N, C, kNormRope);
  constexpr bool kValues = holds_values(N, C, kNormRope), kStaged = stages_keys(N, kNormRope);
  const TemporalAttention& a = f.a;
  const NormRope& how = a.norm_rope;
  const uint32_t warp = thread_index() / 32, number = block_index() * (kTemporalThreads / 32) + warp;
  const bool is_item = number < f.items;
  if (!kStaged && !is_item) return;
  uint32_t item = number;  // of a block's warps past the last item, two of one sequence still stage its two halves
  const int D = a.head_dim, of_sequence = static_cast<int>(f.tiles.split(item));
  SequenceTile tile(f.sequences.at(is_item ? item : 0), of_sequence, is_item);
  tile.other.h = f.shared.quotient(tile.sequence.h);

  bool valid[2];
  Rows<C> q[2], k[kKeys], v[kValues ? N : 1];
  unroll<2>([&](int h) {
    valid[h] = tile.has(h, a.frames.queries);
    load_rows(q[h], tile.row(a.q, h), valid[h], D);
  });
  const bool halves = kStaged && f.tiles.divisor == 2;  // each warp has one of its sequence's keys
  const auto load_keys = [&](int first) {
    unroll<kKeys>([&](int n) { tile.load_other(k[n], a.k, first + n, a.frames.keys, D); });
  };
  load_keys(halves ? 2 * of_sequence : 0);
  const auto load_values = [&](Rows<C>& rows, int n) { tile.load_other(rows, a.v, n, a.frames.keys, D); };
  if constexpr (kValues) unroll<N>([&](int n) { load_values(v[n], n); });

  const SeenByRows visible = tile.seen_by_queries(f.seen, a.frames);
  if constexpr (kNormRope) {
    const int64_t table[2] = {tile.angles(how, a.frames.start, 0, a.frames.queries),
                              tile.angles(how, a.frames.start, 1, a.frames.queries)};
    RowMoments m[2];
    moments<E, kLayer>(m, q, valid, how.kind, how.eps, D);
    norm_rope<E, kLayer, true>(q, m, valid, how, how.q, table, D);
  }

  const auto norm_keys = [&](int first) {
    bool there[kKeys];
    int64_t table[kKeys];
    unroll<kKeys>([&](int n) {
      there[n] = tile.has_other(first + n, a.frames.keys);
      const int frame = 8 * (first + n) + lane_row(), last = a.frames.keys - 1;
      table[n] = angles_at(how, tile.sequence, 0, frame < last ? frame : last);
    });
    RowMoments m[kKeys];
    moments<E, kLayer>(m, k, there, how.kind, how.eps, D);
    norm_rope<E, kLayer, true>(k, m, there, how, how.k, table, D);
  };

  float s[N][4];
  unroll<N, 4>([&](int n, int e) { s[n][e] = 0; });
  if constexpr (kStaged) {
    char* const rows = shared_memory() + (halves ? warp / 2 : warp) * staged_bytes(N, C);
    VDCORE_NO_UNROLL
    for (int half = halves ? of_sequence : 0; half < 2; half += halves ? 2 : 1) {
      if (!halves && half) load_keys(2);
      norm_keys(2 * half);
      unroll<2>([&](int n) { store_shared_row(rows, 16 * half + 8 * n + lane_row(), k[n]); });
    }
    sync_block();
    unroll<N>([&](int n) {
      load_shared_row(k[0], rows, 8 * n + lane_row());
      inner_product<E>(s[n], q[0], q[1], k[0], D);
    });
  } else {
    VDCORE_UNROLL
    for (int first = 0; first < N; first += kKeys) {
      if (first) load_keys(first);
      if constexpr (kNormRope) norm_keys(first);
      unroll<kKeys>([&](int n) { inner_product<E>(s[first + n], q[0], q[1], k[n], D); });
    }
  }

  uint32_t p[N / 2][4];
  float total[2], highest[2] = {-infinity(), -infinity()};
  unroll<2>([&](int h) {
    exponentials(s, h, a.scale * kLog2E, highest[h], visible);
    total[h] = row_sum(add_columns(0, s, h));
    unroll<N>([&](int n) { p[n / 2][h + n % 2 * 2] = pack<E>(s[n][2 * h], s[n][2 * h + 1]); });
  });
  RowSums<C> sums;
  seen_sums<E, N>(
      sums, N, GivenWeights<N>{p}, a.frames.masked, D,
      [&](Rows<C>& rows, int n) {
        if constexpr (kValues)
          rows = v[n];
        else
          load_values(rows, n);
      },
      [&](int n, int i) { return tile.load_other_chunk(a.v, n, i, a.frames.keys, D); }, visible);
  store_tile<E>(sums, {inverse(total[0]), inverse(total[1])}, a.out, tile, a.frames.queries, D);

  if (!a.lse || lane_column() != 0) return;
  unroll<2>([&](int h) {
    if (valid[h]) store_global(a.lse + row_index(a, tile.sequence, tile.frame[h]), log_sum(highest[h], total[h]));
  });
}

template <typename E, int N>
void temporal_forward(const Where& where, const TemporalForward& f) {
  const NormRope& how = f.a.norm_rope;
  const auto fused = [&](auto chunks, auto kind) {
    constexpr int C = decltype(chunks)::value;
    launch_temporal<temporal_forward_kernel<E, N, C, decltype(kind)::value>>(
        where, f, stages_keys(N, true) ? kTemporalThreads / 32 * staged_bytes(N, C) : 0);
  };
  if (how.kind == NormKind::layer) return fused(Constant<kLayerNormChunks>{}, Constant<Fused::layer>{});
  if (how.any())
    return with_chunks<2, 3, 4>(where, f.a.head_dim, [&](auto chunks) { fused(chunks, Constant<Fused::rms>{}); });
  with_chunks<2, 3, 4, 8>(where, f.a.head_dim, [&](auto chunks) {
    launch_temporal<temporal_forward_kernel<E, N, decltype(chunks)::value, Fused::none>>(where, f);
  });
}

template <typename E>
void temporal_attention_forward_of(const Where& where, const TemporalAttention& a) {
  if (!temporal_fits(a.frames.queries, a.frames.keys, a.head_dim))
    launch_error(where, "no kernel for so many frames and channels");
  if (a.norm_rope.any() && !temporal_fuses_norm_rope(a.frames.queries, a.frames.keys, a.head_dim))
    launch_error(where, "no kernel for such norm or rope");
  check_table(where, a);
  const TemporalForward f(where, a);
  if (!temporal_is_short(a.frames.queries, a.frames.keys)) return temporal_long_forward<E>(where, f);
  if (a.frames.keys <= 16) return temporal_forward<E, 2>(where, f);
  temporal_forward<E, 4>(where, f);
}

}  // namespace vdcore::cuda
