// Temporal attention forward, sm_80 and newer.
//
// A line is one (position, head): T rows of D channels, H * D * S channels apart. The work is T / 2 operations a byte,
// so time is bytes: q, k and v in, out out, 8 * T * D of them a line. A warp takes 16 query rows of a line (two lines
// of at most 8 frames share a tile) and all keys at once, and keeps them in registers; nothing is staged in shared
// memory, so what limits bytes in flight is registers alone:
//
//                       T = 16, D = 72     T = 32, D = 128
//   registers, q + k        24 + 24            32 + 16 n     (n: key tiles in flight)
//   scores, sums             8 + 48            16 + 64
//   warps an SM                  16                   8      (__launch_bounds__)
//   loads in flight, KiB         73            up to 32      (an SM needs about 36 at 4.8 TB/s)
//
// Heads of a position lie side by side in memory and are taken by neighbouring warps, so that the pieces of 64 bytes
// that a load touches of a row make up whole lines of L2. Warps of the same line read its keys from L1 after the first
// one. Up to 32 keys take one pass: the softmax knows its whole row before the first product with v. More keys, which
// no released model has: temporal_attention_long.cuh.
//
// Instantiated for 16 and 32 keys and 64, 96, 128 and 256 channels: models have 16 to 32 frames (2 and 4 tiles of keys)
// and heads of 40, 64 (64), 72, 80 (96), 128 and 160 (256) channels. Channels past D are never loaded, only multiplied,
// which a kernel that waits for memory does not feel. Up to 128 channels nothing spills
// (tests/build/test_cuda_code.py).
#pragma once

#include "cuda/qk_norm_rope/norm_rope.cuh"
#include "cuda/temporal_attention/forward_long.cuh"

namespace vdcore::cuda {

// Chosen so that nothing spills: ptxas takes what it may for loads in flight.
constexpr int temporal_blocks_per_sm(int N, int C, bool moved) {
  if (C <= 3) return moved && N == 4 && C == 3 ? 3 : 4;
  return N == 2 && C == 4 ? 3 : 2;
}

// E: element; N: tiles of 8 keys; C: chunks of 32 channels; kMoved: with norm or rope.
template <typename E, int N, int C, bool kMoved>
VDCORE_KERNEL(kTemporalThreads, temporal_blocks_per_sm(N, C, kMoved))
temporal_forward_kernel(const TemporalForward f) {
  const TemporalAttention& a = f.a;
  const int64_t item = static_cast<int64_t>(block_index()) * (kTemporalThreads / 32) + thread_index() / 32;
  if (item >= f.items) return;
  const int D = a.head_dim, r = lane_row(), c = lane_column(), step = f.packed ? 0 : 8;
  const int64_t line = f.packed ? 2 * item : item / f.tiles;
  const int tile = f.packed ? 0 : static_cast<int>(item - line * f.tiles);
  const bool second = !f.packed || line + 1 < a.lines;  // the last tile may hold one line
  const Line lines[2] = {line_at(line, a.positions, a.heads),
                         line_at(f.packed && second ? line + 1 : line, a.positions, a.heads)};
  const int32_t shared = a.heads / a.groups;

  // Rows r and r + 8 of the tile.
  int frame[2];
  bool valid[2];
  Seen seen[2];
  VDCORE_UNROLL
  for (int h = 0; h < 2; ++h) {
    frame[h] = 16 * tile + step * h + r;
    valid[h] = frame[h] < a.frames.queries && (h == 0 || second);
    seen[h] = seen_by_query(a.frames, valid_frames(a.frames, lines[h].b), frame[h]);
  }

  Rows<C> q[2];
  VDCORE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const Line& at = lines[h];
    const char* row = a.q.row(at.b, frame[h], at.s, at.h);
    load_rows(q[h], row, valid[h], D);
    if constexpr (kMoved)
      norm_rope<E>(q[h], valid[h], a.moved, a.moved.q, angles_at(a.moved, at, a.frames.start, frame[h]), D);
  }

  // Tiles of the other side's rows, one after another. A shared tile's second line has a tile of its own.
  const auto first_row = [&](const Tokens& from) { return from.row(lines[0].b, r, lines[0].s, lines[0].h / shared); };
  const auto load_tile = [&](Rows<C>& rows, const Tokens& from, const char*& next, int n, bool moved) {
    const bool other = N == 2 && n == 1 && f.packed;
    const int key = other ? r : 8 * n + r;
    const Line& at = lines[N == 2 ? n : 0];
    const char* row = other ? from.row(at.b, r, at.s, at.h / shared) : next;
    const bool there = key < a.frames.keys && (!other || second);
    next += 8 * from.t;
    load_rows(rows, row, there, D);
    if constexpr (kMoved) {
      if (moved) norm_rope<E>(rows, there, a.moved, a.moved.k, angles_at(a.moved, at, 0, key), D);
    }
  };

  float s[N][4];
  const char* k_row = first_row(a.k);
  VDCORE_UNROLL
  for (int n = 0; n < N; ++n) {
    s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
    Rows<C> k;
    load_tile(k, a.k, k_row, n, true);
    inner_product<E>(s[n], q[0], q[1], k, D);
  }

  // Is column 2 c + e of tile n visible to row half h? In a shared tile each line's keys have a tile of their own.
  const auto visible = [&](int n, int h, int e) { return seen[h](8 * n + 2 * c + e - (f.packed ? 8 * h : 0)); };
  const float factor = a.scale * kLog2E;
  uint32_t p[N / 2][4];
  float total[2], highest[2];
  VDCORE_UNROLL
  for (int h = 0; h < 2; ++h) {
    float m = -infinity();
    VDCORE_UNROLL
    for (int n = 0; n < N; ++n) VDCORE_UNROLL
    for (int e = 0; e < 2; ++e) {
      float& x = s[n][2 * h + e];
      x = visible(n, h, e) ? x * factor : -infinity();
      m = maximum(m, x);
    }
    m = row_maximum(m);
    highest[h] = m == -infinity() ? 0 : m;
    float sum = 0;
    VDCORE_UNROLL
    for (int n = 0; n < N; ++n) {
      VDCORE_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& x = s[n][2 * h + e];
        x = exp2_approx(x - highest[h]);
        sum += x;
      }
      p[n / 2][h + n % 2 * 2] = pack<E>(s[n][2 * h], s[n][2 * h + 1]);
    }
    total[h] = row_sum(sum);
  }

  seen_sums<E, N, C>(
      p, first_row(a.v), a.frames.masked || f.packed, D,
      [&](Rows<C>& rows, const char*& next, int n) { load_tile(rows, a.v, next, n, false); }, visible,
      [&](const RowSums<C>& sums, const bool (&now)[2]) {
        VDCORE_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float each = total[h] == 0 ? 0 : reciprocal(total[h]);
          store_rows<E>(sums, h, each, a.out.row(lines[h].b, frame[h], lines[h].s, lines[h].h), valid[h] && now[h], D);
        }
      });

  if (a.lse && c == 0) {
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h)
      if (valid[h])
        store_global(a.lse + row_index(a, lines[h], frame[h]), (highest[h] + log2_approx(total[h])) * (1 / kLog2E));
  }
}

template <typename E, int N, int C>
void temporal_forward(const Where& where, const TemporalForward& f) {
  if constexpr (temporal_moves(8 * N, 32 * C))
    if (f.a.moved.any()) return launch_temporal(where, temporal_forward_kernel<E, N, C, true>, f);
  launch_temporal(where, temporal_forward_kernel<E, N, C, false>, f);
}

template <typename E, int N>
void temporal_forward(const Where& where, const TemporalForward& f) {
  const int D = f.a.head_dim;
  if (D <= 64) return temporal_forward<E, N, 2>(where, f);
  if (D <= 96) return temporal_forward<E, N, 3>(where, f);
  if (D <= 128) return temporal_forward<E, N, 4>(where, f);
  temporal_forward<E, N, 8>(where, f);
}

template <typename E>
void temporal_attention_forward_of(const Where& where, const TemporalAttention& a) {
  if (!temporal_fits(a.frames.keys, a.head_dim)) launch_error(where, "no kernel for so many frames and channels");
  if (a.moved.any() && !temporal_moves(a.frames.keys, a.head_dim))
    launch_error(where, "no kernel for such norm or rope");
  TemporalForward f{a, 0, (a.frames.queries + 15) / 16, a.frames.queries <= 8 && a.frames.keys <= 8};
  f.items = f.packed ? (a.lines + 1) / 2 : a.lines * f.tiles;
  if (a.frames.keys <= 16) return temporal_forward<E, 2>(where, f);
  if (a.frames.keys <= 32) return temporal_forward<E, 4>(where, f);
  temporal_long_forward<E>(where, f);
}

}  // namespace vdcore::cuda
