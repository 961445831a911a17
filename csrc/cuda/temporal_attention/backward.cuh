// Temporal attention backward, sm_80 and newer: one pass, no atomics, the same bits every time.
//
// All frames of a line are at hand, so probabilities are computed again from q and k, and neither the result nor its
// lse is read: q, k, v and dout in, dq, dk and dv out, 14 T D bytes a line. The warps of a line, 16 rows each, first
// take their rows as queries:
//   S = Q K^T, dP = dO V^T, P = softmax(S), delta = sum_k P dP - dlse, dS = P (dP - delta), dQ = dS K
// leave each row's lse and delta in shared memory (8 bytes a row), and then take their rows as keys:
//   S^T = K Q^T, dP^T = V dO^T, P^T and dS^T from those, dV = P^T dO, dK = dS^T Q
// Two products more than the least, in place of a transposition of P and dS through shared memory; what the second part
// reads was just read by the first one and is in L1.
//
// With norm or rope every warp first norms and turns its own rows of q and k, once, and leaves them in shared memory,
// where all warps of the line read them; gradients are taken back in the registers they are summed in, in float32.
//
//                                      T = 16, D = 72     T = 32, D = 128
//   registers, rows of two tensors         48                 64
//   scores and their gradients             16                 32
//   rows of the other side in flight       24 n               32 n
//   sums                                   48                 64
//   warps an SM                            12                  8
//   shared memory a block, KiB             31                 41      norm and rope: 64 rows of q and k, weight sums
//
// More frames, shared keys and wider heads: temporal_attention_backward_long.cuh. 64 frames would fit here with 64
// registers of scores, some of them spilled, for a quarter of this file's time to compile; no workload trains on as
// many.
#pragma once

#include "cuda/core/sequences.cuh"
#include "cuda/qk_norm_rope/norm_rope_backward.cuh"
#include "cuda/temporal_attention/backward_long.cuh"

namespace vdcore::cuda {

struct TemporalBackward {
  TemporalAttentionBackward a;
  int64_t items;  // lines, or pairs of them
  bool packed;    // two lines a tile
};

constexpr int kBackwardThreads = 128, kBackwardRows = kBackwardThreads / 32 * 16;  // of all lines of a block
constexpr int temporal_backward_blocks_per_sm(int N, int C) { return N == 2 && C <= 3 ? 3 : 2; }
constexpr int temporal_backward_shared_bytes(int C, bool moved) {
  return 8 * kBackwardRows + (moved ? 2 * 64 * C * kBackwardRows + kBackwardThreads / 32 * weight_sum_bytes(C) : 0);
}

template <typename E, int N, int C, bool kMoved>
VDCORE_KERNEL(kBackwardThreads, temporal_backward_blocks_per_sm(N, C))
temporal_backward_kernel(const TemporalBackward f) {
  constexpr int kWarps = N / 2, kLines = kBackwardThreads / 32 / kWarps;  // of a line; of a block
  const TemporalAttentionBackward& g = f.a;
  const TemporalAttention& a = g.forward;
  const int warp = static_cast<int>(thread_index() / 32), tile = warp % kWarps;
  const int D = a.head_dim, r = lane_row(), c = lane_column(), step = f.packed ? 0 : 8;
  const int64_t item = static_cast<int64_t>(block_index()) * kLines + warp / kWarps;
  const int64_t line = f.packed ? 2 * item : item;
  const bool there[2] = {line < a.lines, f.packed ? line + 1 < a.lines : line < a.lines};
  const Line lines[2] = {line_at(there[0] ? line : 0, a.positions, a.heads),
                         line_at(there[1] ? line + f.packed : 0, a.positions, a.heads)};
  const int64_t length[2] = {valid_frames(a.frames, lines[0].b), valid_frames(a.frames, lines[1].b)};
  const bool hides = a.frames.masked || f.packed;
  const float factor = a.scale * kLog2E;

  // Of a block: q as the scores see it, k as they see it, weight sums of each warp; then lse and delta of each row.
  char* const q_seen = shared_memory() + warp / kWarps * (8 * N) * 64 * C;
  char* const k_seen = q_seen + kBackwardRows * 64 * C;
  float* const all_sums = reinterpret_cast<float*>(shared_memory() + 2 * kBackwardRows * 64 * C);
  float* const sums_of_warp = g.sums ? all_sums + warp * (weight_sum_bytes(C) / 4) : nullptr;
  auto* const stats =
      reinterpret_cast<Vec2*>(shared_memory() + temporal_backward_shared_bytes(C, kMoved) - 8 * kBackwardRows) +
      warp / kWarps * (8 * N);

  // The side that a warp's rows are on, and the other one: q beside dout, k beside v.
  struct Side {
    const Tokens &scored, &other, &gradient;
    char* seen;
    int count;
    const HeadNorm& norm;
    int64_t start;  // row of the table of frame 0
    bool keys;
  };
  const Side queries{a.q, g.dout, g.dq, q_seen, a.frames.queries, a.moved.q, a.frames.start, false};
  const Side keys{a.k, a.v, g.dk, k_seen, a.frames.keys, a.moved.k, 0, true};

  // Row r of half h of the warp's tile, and whether it is one.
  int frame[2];
  VDCORE_UNROLL
  for (int h = 0; h < 2; ++h) frame[h] = 16 * tile + step * h + r;
  const auto valid = [&](const Side& side, int h) { return there[h] && frame[h] < side.count; };
  const auto row_of = [&](const Tokens& x, int h) { return x.row(lines[h].b, frame[h], lines[h].s, lines[h].h); };
  const auto load_own = [&](Rows<C>(&rows)[2], const Tokens& x, const Side& side) {
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) load_rows(rows[h], row_of(x, h), valid(side, h), D);
  };
  const auto load_own_scored = [&](Rows<C>(&rows)[2], const Side& side) {
    if constexpr (kMoved) {
      VDCORE_UNROLL
      for (int h = 0; h < 2; ++h) load_shared_row(rows[h], side.seen, 16 * tile + 8 * h + r);
    } else {
      load_own(rows, side.scored, side);
    }
  };

  // Tiles of the other side's rows, one after another, as in the forward kernel.
  const auto first_row = [&](const Tokens& x) { return x.row(lines[0].b, r, lines[0].s, lines[0].h); };
  const auto load_tile = [&](Rows<C>& rows, const Tokens& x, const char*& next, int n, int count) {
    const bool other = N == 2 && n == 1 && f.packed;
    const int i = other ? r : 8 * n + r;
    const char* row = other ? x.row(lines[1].b, r, lines[1].s, lines[1].h) : next;
    next += 8 * x.t;
    load_rows(rows, row, i < count && (other ? there[1] : there[0]), D);
  };
  const auto load_scored = [&](Rows<C>& rows, const Side& side, const char*& next, int n) {
    if constexpr (kMoved)
      load_shared_row(rows, side.seen, 8 * n + r);
    else
      load_tile(rows, side.scored, next, n, side.count);
  };

  // Scores and products of gradients with values, of the warp's rows with all rows of the other side.
  float s[N][4], dp[N][4];
  const auto products = [&](const Side& own, const Side& other) {
    Rows<C> x[2], y[2];
    load_own_scored(x, own);
    load_own(y, own.other, own);
    const char *next_x = first_row(other.scored), *next_y = first_row(other.other);
    VDCORE_UNROLL
    for (int n = 0; n < N; ++n) {
      VDCORE_UNROLL
      for (int e = 0; e < 4; ++e) s[n][e] = dp[n][e] = 0;
      Rows<C> x_tile, y_tile;
      load_scored(x_tile, other, next_x, n);
      load_tile(y_tile, other.other, next_y, n, other.count);
      inner_product<E>(s[n], x[0], x[1], x_tile, D);
      inner_product<E>(dp[n], y[0], y[1], y_tile, D);
    }
  };
  const auto visible_to = [&](const Seen(&seen)[2]) {
    return [&](int n, int h, int e) { return seen[h](8 * n + 2 * c + e - (f.packed ? 8 * h : 0)); };
  };
  // Sums of scored rows of the other side: the gradient of the warp's own.
  const auto store_gradient = [&](const uint32_t (&weights)[N / 2][4], const Side& own, const Side& other,
                                  const Seen(&seen)[2]) {
    seen_sums<E, N, C>(
        weights, first_row(other.scored), hides, D,
        [&](Rows<C>& rows, const char*& next, int n) { load_scored(rows, other, next, n); }, visible_to(seen),
        [&](RowSums<C>& sums, const bool (&now)[2]) {
          if constexpr (kMoved) {
            const char* const rows[2] = {row_of(own.scored, 0), row_of(own.scored, 1)};
            const bool live[2] = {now[0] && valid(own, 0) && seen[0].any(), now[1] && valid(own, 1) && seen[1].any()};
            const int64_t table[2] = {angles_at(a.moved, lines[0], own.start, frame[0]),
                                      angles_at(a.moved, lines[1], own.start, frame[1])};
            norm_rope_back<E>(sums, rows, live, table, a.moved, own.norm, weight_sums_of<C>(sums_of_warp, own.keys), D);
          }
          VDCORE_UNROLL
          for (int h = 0; h < 2; ++h) store_rows<E>(sums, h, 1, row_of(own.gradient, h), now[h] && valid(own, h), D);
        });
  };

  if constexpr (kMoved) {
    if (sums_of_warp) clear_weight_sums<C>(sums_of_warp);
    const auto stage = [&](const Side& side) {
      Rows<C> x[2];
      load_own(x, side.scored, side);
      VDCORE_UNROLL
      for (int h = 0; h < 2; ++h) {
        norm_rope<E>(x[h], valid(side, h), a.moved, side.norm, angles_at(a.moved, lines[h], side.start, frame[h]), D);
        store_shared_row(side.seen, 16 * tile + 8 * h + r, x[h]);
      }
    };
    stage(queries);
    stage(keys);
    sync_block();
  }

  uint32_t weights[N / 2][4];
  {
    Seen seen[2];
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) seen[h] = seen_by_query(a.frames, length[h], frame[h]);
    const auto visible = visible_to(seen);
    products(queries, keys);
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float highest = -infinity(), total = 0, delta = 0;
      VDCORE_UNROLL
      for (int n = 0; n < N; ++n) VDCORE_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& x = s[n][2 * h + e];
        x = visible(n, h, e) ? x * factor : -infinity();
        highest = maximum(highest, x);
      }
      highest = row_maximum(highest);
      if (highest == -infinity()) highest = 0;
      VDCORE_UNROLL
      for (int n = 0; n < N; ++n) VDCORE_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& x = s[n][2 * h + e];
        x = exp2_approx(x - highest);
        total += x;
        if (visible(n, h, e)) delta += x * dp[n][2 * h + e];
      }
      total = row_sum(total);
      const float each = total == 0 ? 0 : reciprocal(total);
      delta = row_sum(delta) * each;
      if (g.dlse && valid(queries, h)) delta -= load_global<float>(g.dlse + row_index(a, lines[h], frame[h]));
      VDCORE_UNROLL
      for (int n = 0; n < N; ++n) {
        float ds[2];
        VDCORE_UNROLL
        for (int e = 0; e < 2; ++e)
          ds[e] = visible(n, h, e) ? s[n][2 * h + e] * each * (dp[n][2 * h + e] - delta) * a.scale : 0;
        weights[n / 2][h + n % 2 * 2] = pack<E>(ds[0], ds[1]);
      }
      if (c == 0) store_shared(stats + 16 * tile + 8 * h + r, Float2{highest + log2_approx(total), delta});
    }
    store_gradient(weights, queries, keys, seen);
  }
  sync_block();
  {
    Seen seen[2];
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) seen[h] = seen_by_key(a.frames, length[h], frame[h]);
    const auto visible = visible_to(seen);
    products(keys, queries);
    uint32_t ds[N / 2][4];
    VDCORE_UNROLL
    for (int n = 0; n < N; ++n) {
      Float2 of[2];  // lse and delta of the two columns
      VDCORE_UNROLL
      for (int e = 0; e < 2; ++e) of[e] = load_shared<Float2>(stats + 8 * n + 2 * c + e);
      VDCORE_UNROLL
      for (int h = 0; h < 2; ++h) {
        float p[2], dx[2];
        VDCORE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const bool sees = visible(n, h, e);
          p[e] = sees ? exp2_approx(s[n][2 * h + e] * factor - of[e].lo) : 0;
          dx[e] = sees ? p[e] * (dp[n][2 * h + e] - of[e].hi) * a.scale : 0;
        }
        weights[n / 2][h + n % 2 * 2] = pack<E>(p[0], p[1]);
        ds[n / 2][h + n % 2 * 2] = pack<E>(dx[0], dx[1]);
      }
    }
    seen_sums<E, N, C>(
        weights, first_row(g.dout), hides, D,
        [&](Rows<C>& rows, const char*& next, int n) { load_tile(rows, g.dout, next, n, queries.count); }, visible,
        [&](const RowSums<C>& sums, const bool (&now)[2]) {
          VDCORE_UNROLL
          for (int h = 0; h < 2; ++h) store_rows<E>(sums, h, 1, row_of(g.dv, h), now[h] && valid(keys, h), D);
        });
    store_gradient(ds, keys, queries, seen);
  }
  if constexpr (kMoved)
    if (g.sums) store_weight_sums<C>(g.sums, all_sums, kBackwardThreads / 32, D);
}

template <typename E, int N, int C, bool kMoved>
void temporal_backward_kernel_of(const Where& where, const TemporalBackward& f) {
  constexpr int kLines = kBackwardThreads / 32 / (N / 2);
  launch(where, temporal_backward_kernel<E, N, C, kMoved>, (f.items + kLines - 1) / kLines, kBackwardThreads,
         temporal_backward_shared_bytes(C, kMoved), f);
}

template <typename E, int N, int C>
void temporal_backward(const Where& where, const TemporalBackward& f) {
  if (f.a.forward.moved.any()) return temporal_backward_kernel_of<E, N, C, true>(where, f);
  temporal_backward_kernel_of<E, N, C, false>(where, f);
}

template <typename E>
void temporal_attention_backward_of(const Where& where, const TemporalAttentionBackward& args) {
  const TemporalAttention& a = args.forward;
  const int frames = a.frames.queries > a.frames.keys ? a.frames.queries : a.frames.keys, D = a.head_dim;
  const int shared = a.heads / a.groups;
  if (!temporal_backward_fits(a.frames.queries, a.frames.keys, D, shared))
    launch_error(where, "no kernel for so many frames and channels");
  if (a.moved.any() && !temporal_backward_moves(D)) launch_error(where, "no kernel for such norm or rope");
  if (!temporal_backward_is_short(frames, D, shared)) return temporal_long_backward<E>(where, args);
  TemporalBackward f{args, a.lines, temporal_backward_packs(frames)};
  if (f.packed) f.items = (a.lines + 1) / 2;
  if (frames <= 16) {
    if (D <= 64) return temporal_backward<E, 2, 2>(where, f);
    if (D <= 96) return temporal_backward<E, 2, 3>(where, f);
    return temporal_backward<E, 2, 4>(where, f);
  }
  if (D <= 64) return temporal_backward<E, 4, 2>(where, f);
  if (D <= 96) return temporal_backward<E, 4, 3>(where, f);
  return temporal_backward<E, 4, 4>(where, f);
}

}  // namespace vdcore::cuda
