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
//                                      T = 16, D = 72     T = 32, D = 128     T = 64, D = 128
//   registers, rows of two tensors         48                 64                  64
//   scores and their gradients             16                 32                  64
//   rows of the other side in flight       24 n               32 n                32 n
//   sums                                   48                 64                  64
//   warps an SM                            12                  8                   8
#pragma once

#include "cuda/lines.cuh"

namespace vdcore::cuda {

struct TemporalBackward {
  TemporalAttentionBackward a;
  int64_t items;  // lines, or pairs of them
  bool packed;    // two lines a tile
};

constexpr int temporal_backward_threads(int N) { return N / 2 > 4 ? 16 * N : 128; }
constexpr int temporal_backward_blocks_per_sm(int N, int C) { return N == 2 && C <= 3 ? 3 : N == 16 ? 1 : 2; }

template <typename E, int N, int C>
VDCORE_KERNEL(temporal_backward_threads(N), temporal_backward_blocks_per_sm(N, C))
temporal_backward_kernel(const TemporalBackward f) {
  constexpr int kWarps = N / 2, kLines = temporal_backward_threads(N) / 32 / kWarps;  // of a line; of a block
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
  // Row r of half h of the warp's tile, and whether it is one.
  int frame[2];
  VDCORE_UNROLL
  for (int h = 0; h < 2; ++h) frame[h] = 16 * tile + step * h + r;
  const auto row_of = [&](const Tokens& x, int h) { return x.row(lines[h].b, frame[h], lines[h].s, lines[h].h); };
  const auto load_own = [&](Rows<C>(&rows)[2], const Tokens& x, int count) {
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) load_rows(rows[h], row_of(x, h), there[h] && frame[h] < count, D);
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
  const auto store = [&](const Tokens& to, int count) {
    return [&, to, count](const RowSums<C>& sums, int h, bool now) {
      store_rows<E>(sums, h, 1, row_of(to, h), now && there[h] && frame[h] < count, D);
    };
  };
  const int queries = a.frames.queries, keys = a.frames.keys;
  const bool hides = a.frames.masked || f.packed;
  const float factor = a.scale * 1.4426950408889634f;
  auto* const rows_of_line = reinterpret_cast<Vec2*>(shared_memory()) + warp / kWarps * (8 * N);
  uint32_t weights[N / 2][4];

  {
    Seen seen[2];
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) seen[h] = seen_by_query(a.frames, length[h], frame[h]);
    const auto visible = [&](int n, int h, int e) { return seen[h](8 * n + 2 * c + e - (f.packed ? 8 * h : 0)); };
    Rows<C> q[2], dout[2];
    load_own(q, a.q, queries);
    load_own(dout, g.dout, queries);
    float s[N][4], dp[N][4];
    const char *k_row = first_row(a.k), *v_row = first_row(a.v);
    VDCORE_UNROLL
    for (int n = 0; n < N; ++n) {
      VDCORE_UNROLL
      for (int e = 0; e < 4; ++e) s[n][e] = dp[n][e] = 0;
      Rows<C> k, v;
      load_tile(k, a.k, k_row, n, keys);
      load_tile(v, a.v, v_row, n, keys);
      inner_product<E>(s[n], q[0], q[1], k, D);
      inner_product<E>(dp[n], dout[0], dout[1], v, D);
    }
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
      if (g.dlse && there[h] && frame[h] < queries)
        delta -= load_global<float>(g.dlse + ((lines[h].b * queries + frame[h]) * a.positions + lines[h].s) * a.heads +
                                    lines[h].h);
      VDCORE_UNROLL
      for (int n = 0; n < N; ++n) {
        float ds[2];
        VDCORE_UNROLL
        for (int e = 0; e < 2; ++e)
          ds[e] = visible(n, h, e) ? s[n][2 * h + e] * each * (dp[n][2 * h + e] - delta) * a.scale : 0;
        weights[n / 2][h + n % 2 * 2] = pack<E>(ds[0], ds[1]);
      }
      if (c == 0) {
        const Float2 kept{highest + log2_approx(total), delta};
        store_shared(rows_of_line + 16 * tile + 8 * h + r, kept);
      }
    }
    seen_sums<E, N, C>(
        weights, first_row(a.k), hides, D,
        [&](Rows<C>& rows, const char*& next, int n) { load_tile(rows, a.k, next, n, keys); }, visible,
        store(g.dq, queries));
  }
  sync_block();
  {
    Seen seen[2];
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) seen[h] = seen_by_key(a.frames, length[h], frame[h]);
    const auto visible = [&](int n, int h, int e) { return seen[h](8 * n + 2 * c + e - (f.packed ? 8 * h : 0)); };
    Rows<C> k[2], v[2];
    load_own(k, a.k, keys);
    load_own(v, a.v, keys);
    float s[N][4], dp[N][4];
    const char *q_row = first_row(a.q), *dout_row = first_row(g.dout);
    VDCORE_UNROLL
    for (int n = 0; n < N; ++n) {
      VDCORE_UNROLL
      for (int e = 0; e < 4; ++e) s[n][e] = dp[n][e] = 0;
      Rows<C> q, dout;
      load_tile(q, a.q, q_row, n, queries);
      load_tile(dout, g.dout, dout_row, n, queries);
      inner_product<E>(s[n], k[0], k[1], q, D);
      inner_product<E>(dp[n], v[0], v[1], dout, D);
    }
    uint32_t ds[N / 2][4];
    VDCORE_UNROLL
    for (int n = 0; n < N; ++n) {
      Float2 of[2];  // lse and delta of the two columns
      VDCORE_UNROLL
      for (int e = 0; e < 2; ++e) of[e] = load_shared<Float2>(rows_of_line + 8 * n + 2 * c + e);
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
        [&](Rows<C>& rows, const char*& next, int n) { load_tile(rows, g.dout, next, n, queries); }, visible,
        store(g.dv, keys));
    seen_sums<E, N, C>(
        ds, first_row(a.q), hides, D,
        [&](Rows<C>& rows, const char*& next, int n) { load_tile(rows, a.q, next, n, queries); }, visible,
        store(g.dk, keys));
  }
}

template <typename E, int N, int C>
void temporal_backward(const Where& where, const TemporalBackward& f) {
  constexpr int kThreads = temporal_backward_threads(N), kLines = kThreads / 32 / (N / 2);
  launch(where, temporal_backward_kernel<E, N, C>, (f.items + kLines - 1) / kLines, kThreads, kThreads / 2 * 8, f);
}

template <typename E>
void temporal_attention_backward_of(const Where& where, const TemporalAttentionBackward& args) {
  const TemporalAttention& a = args.forward;
  const int frames = a.frames.queries > a.frames.keys ? a.frames.queries : a.frames.keys, D = a.head_dim;
  if (!temporal_backward_fits(frames, D)) launch_error(where, "no kernel for so many frames and channels");
  if (a.heads != a.groups || a.moved.any()) launch_error(where, "no kernel for grouped heads, norm or rope");
  TemporalBackward f{args, a.lines, frames <= 8};
  if (f.packed) f.items = (a.lines + 1) / 2;
  if (frames <= 16) {
    if (D <= 64) return temporal_backward<E, 2, 2>(where, f);
    if (D <= 96) return temporal_backward<E, 2, 3>(where, f);
    return temporal_backward<E, 2, 4>(where, f);
  }
  if (frames <= 32) {
    if (D <= 64) return temporal_backward<E, 4, 2>(where, f);
    if (D <= 96) return temporal_backward<E, 4, 3>(where, f);
    return temporal_backward<E, 4, 4>(where, f);
  }
  if (frames > 64) return temporal_backward<E, 16, 2>(where, f);
  if (D <= 64) return temporal_backward<E, 8, 2>(where, f);
  return temporal_backward<E, 8, 4>(where, f);
}

}  // namespace vdcore::cuda
