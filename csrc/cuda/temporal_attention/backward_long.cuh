// Temporal attention backward where a line is long, wide or shared: up to 256 frames, keys with several query heads,
// and 256 channels. Same formulas and sums as temporal_attention_backward.cuh, other places.
//
// A block takes one line of keys with all query heads that share it. Queries and keys, normed and turned on the way,
// stay in shared memory; dout and v come through L1. lse of every query row is known, so that scores need not be in
// registers all at once: they are computed 16 x 16 at a time, four times in all:
//   delta = rowsum(P * dP) - dlse and then dQ = dS K of 16 query rows,
//   dV = P^T dO and dK = dS^T Q of 16 key rows and the queries of all heads.
// delta could be rowsum(dout * out) - dlse without the first of them, but out is rounded: the error of delta is one of
// all of a row's dS, and where keys have a mean it adds up in dQ to several times that of torch's softmax.
// 14 T D bytes a line and 10 products: beyond 64 frames arithmetic is the limit.
//
//                                 D <= 64      96      128     256
//   registers, own rows and sums       64      96      128     128     (beyond 128 channels own rows are read again)
//   shared memory, KiB, 256 frames     66      98      130       -     one query head a key head
#pragma once

#include "cuda/core/sequences.cuh"
#include "cuda/qk_norm_rope/norm_rope_backward.cuh"

namespace vdcore::cuda {

struct False {
  static constexpr bool value = false;
};
struct True {
  static constexpr bool value = true;
};

struct TemporalLongBackward {
  TemporalAttentionBackward a;
  int32_t query_tiles, key_tiles, warps;  // tiles: of 16 rows a head; warps: of a block
};

template <typename E, int C>
VDCORE_KERNEL(32 * kLongBackwardWarps, 1)
temporal_long_backward_kernel(const TemporalLongBackward f) {
  constexpr int kRowBytes = 64 * C;
  constexpr bool kMoves = temporal_backward_moves(32 * C), kHeld = C <= 4;
  const TemporalAttentionBackward& g = f.a;
  const TemporalAttention& a = g.forward;
  const int warp = static_cast<int>(thread_index() / 32), D = a.head_dim, r = lane_row(), c = lane_column();
  const int shared = a.heads / a.groups;
  const Line line = line_at(block_index(), a.positions, a.groups);
  const int64_t length = valid_frames(a.frames, line.b);
  const float factor = a.scale * kLog2E;

  char* const q_seen = shared_memory();
  char* const k_seen = q_seen + shared * f.query_tiles * 16 * kRowBytes;
  auto* const stats = reinterpret_cast<Vec2*>(k_seen + f.key_tiles * 16 * kRowBytes);
  auto* const all_sums = reinterpret_cast<float*>(stats + shared * f.query_tiles * 16);
  float* const sums_of_warp = g.sums ? all_sums + warp * (weight_sum_bytes(C) / 4) : nullptr;
  if (kMoves && sums_of_warp) clear_weight_sums<C>(sums_of_warp);

  // Tiles of 16 rows of all heads of a side follow one another.
  struct Side {
    const Tokens &scored, &other, &gradient;
    char* seen;
    int count, tiles, heads, first_head;
    const HeadNorm& norm;
    int64_t start;  // row of the table of frame 0
    bool keys;
  };
  const Side queries{a.q,       g.dout,         g.dq, q_seen, a.frames.queries, f.query_tiles, shared, line.h * shared,
                     a.moved.q, a.frames.start, false};
  const Side keys{a.k, a.v, g.dk, k_seen, a.frames.keys, f.key_tiles, 1, line.h, a.moved.k, 0, true};
  const auto row_of = [&](const Tokens& x, int frame, int head) { return x.row(line.b, frame, line.s, head); };

  const auto stage = [&](const Side& side) {
    VDCORE_NO_UNROLL
    for (int tile = warp; tile < side.tiles * side.heads; tile += f.warps) {
      const int head = side.first_head + tile / side.tiles;
      VDCORE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int frame = 16 * (tile % side.tiles) + 8 * h + r;
        const bool valid = frame < side.count;
        const Line at{line.b, line.s, head};
        Rows<C> x;
        load_rows(x, row_of(side.scored, frame, head), valid, D);
        if (kMoves && a.moved.any())
          norm_rope<E>(x, valid, a.moved, side.norm, angles_at(a.moved, at, side.start, frame), D);
        store_shared_row(side.seen, 16 * tile + 8 * h + r, x);
      }
    }
  };
  stage(queries);
  stage(keys);
  sync_block();

  // The gradient of the rows of one tile of one side; leaves lse and delta of queries in shared memory. kValues: of v,
  // else of what its scores are computed from.
  const auto gradient = [&](auto of_values, const Side& own, const Side& other, int tile) {
    constexpr bool kValues = decltype(of_values)::value;
    const int own_head = own.first_head + tile / own.tiles, other_tiles = 2 * other.tiles;  // of 8 rows a head
    const int own_at = 16 * tile + r;
    int frame[2];
    bool valid[2];
    Seen seen[2];
    Float2 own_stats[2] = {{0, 0}, {0, 0}};
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) {
      frame[h] = 16 * (tile % own.tiles) + 8 * h + r;
      valid[h] = frame[h] < own.count;
      seen[h] = own.keys ? seen_by_key(a.frames, length, frame[h]) : seen_by_query(a.frames, length, frame[h]);
    }
    const auto visible = [&](int n, int h, int e) { return seen[h](8 * (n % other_tiles) + 2 * c + e); };
    const auto own_row = [&](int h) { return row_of(own.other, frame[h], own_head); };
    const auto load_own = [&](Rows<C>& x, Rows<C>& y, int h) {
      load_shared_row(x, own.seen, own_at + 8 * h);
      if (!kValues) load_rows(y, own_row(h), valid[h], D);
    };
    const auto other_row = [&](int n, bool& there) {
      const int at = 8 * (n % other_tiles) + r;
      there = at < other.count;
      return row_of(other.other, at, other.first_head + n / other_tiles);
    };
    const auto load_other = [&](Rows<C>& rows, int n) {
      bool there;
      const char* const row = other_row(n, there);
      load_rows(rows, row, there, D);
    };
    Rows<C> x[2], y[2];
    if (kHeld) load_own(x[0], y[0], 0), load_own(x[1], y[1], 1);
    // Scores of tile n of the other side, and products of gradients with values.
    const auto products = [&](int n, float (&s)[4], float (&dp)[4]) {
      VDCORE_UNROLL
      for (int e = 0; e < 4; ++e) s[e] = dp[e] = 0;
      if constexpr (kHeld) {
        Rows<C> rows;
        load_shared_row(rows, other.seen, 8 * n + r);
        inner_product<E>(s, x[0], x[1], rows, D);
        if (!kValues) {
          load_other(rows, n);
          inner_product<E>(dp, y[0], y[1], rows, D);
        }
      } else {
        bool there;
        const char* const row = other_row(n, there);
        VDCORE_UNROLL_BY(2)
        for (int i = 0; 32 * i < D; ++i) {
          Rows<1> a[2], b;
          VDCORE_UNROLL
          for (int h = 0; h < 2; ++h) a[h].x[0] = load_shared<Vec4>(shared_chunk<C>(own.seen, own_at + 8 * h, i));
          b.x[0] = load_shared<Vec4>(shared_chunk<C>(other.seen, 8 * n + r, i));
          inner_product<E>(s, a[0], a[1], b, D);
          if constexpr (!kValues) {
            VDCORE_UNROLL
            for (int h = 0; h < 2; ++h) load_rows(a[h], own_row(h) + 64 * i, valid[h], D - 32 * i);
            load_rows(b, row + 64 * i, there, D - 32 * i);
            inner_product<E>(dp, a[0], a[1], b, D);
          }
        }
      }
    };
    if (!kValues && !own.keys) {
      const Line at{line.b, line.s, own_head};
      VDCORE_UNROLL
      for (int h = 0; h < 2; ++h)
        if (valid[h]) own_stats[h].lo = load_global<float>(a.lse + row_index(a, at, frame[h])) * kLog2E;
      VDCORE_NO_UNROLL
      for (int n = 0; n < other_tiles; ++n) {
        float s[4], dp[4];
        products(n, s, dp);
        VDCORE_UNROLL
        for (int h = 0; h < 2; ++h) VDCORE_UNROLL
        for (int e = 0; e < 2; ++e)
          if (visible(n, h, e)) own_stats[h].hi += exp2_approx(s[2 * h + e] * factor - own_stats[h].lo) * dp[2 * h + e];
      }
      VDCORE_UNROLL
      for (int h = 0; h < 2; ++h) {
        own_stats[h].hi = row_sum(own_stats[h].hi);
        if (g.dlse && valid[h]) own_stats[h].hi -= load_global<float>(g.dlse + row_index(a, at, frame[h]));
        if (c == 0) store_shared(stats + own_at + 8 * h, own_stats[h]);
      }
    }
    const auto weights = [&](int kk, uint32_t (&w)[4], RowSums<C>&) {
      VDCORE_UNROLL
      for (int m = 0; m < 2; ++m) {
        const int n = 2 * kk + m;
        float s[4], dp[4];
        products(n, s, dp);
        float weight[4];
        VDCORE_UNROLL
        for (int e = 0; e < 2; ++e) {
          Float2 of{};
          if (own.keys) of = load_shared<Float2>(stats + 8 * n + 2 * c + e);
          VDCORE_UNROLL
          for (int h = 0; h < 2; ++h) {
            const Float2& at = own.keys ? of : own_stats[h];
            const bool sees = visible(n, h, e);
            const float p = sees ? exp2_approx(s[2 * h + e] * factor - at.lo) : 0;
            weight[2 * h + e] = kValues ? p : sees ? p * (dp[2 * h + e] - at.hi) * a.scale : 0;
          }
        }
        VDCORE_UNROLL
        for (int h = 0; h < 2; ++h) w[h + 2 * m] = pack<E>(weight[2 * h], weight[2 * h + 1]);
      }
    };
    seen_sums<E, 0, C>(
        other_tiles * other.heads, weights, nullptr, a.frames.masked, D,
        [&](Rows<C>& rows, const char*&, int n) {
          if (kValues)
            load_other(rows, n);
          else
            load_shared_row(rows, other.seen, 8 * n + r);
        },
        visible,
        [&](RowSums<C>& sums, const bool (&now)[2]) {
          if (kMoves && !kValues && a.moved.any()) {
            const Line at{line.b, line.s, own_head};
            const char* const rows[2] = {row_of(own.scored, frame[0], own_head),
                                         row_of(own.scored, frame[1], own_head)};
            const bool live[2] = {now[0] && valid[0] && seen[0].any(), now[1] && valid[1] && seen[1].any()};
            const int64_t table[2] = {angles_at(a.moved, at, own.start, frame[0]),
                                      angles_at(a.moved, at, own.start, frame[1])};
            norm_rope_back<E>(sums, rows, live, table, a.moved, own.norm, weight_sums_of<C>(sums_of_warp, own.keys), D);
          }
          VDCORE_UNROLL
          for (int h = 0; h < 2; ++h)
            store_rows<E>(sums, h, 1, row_of(kValues ? g.dv : own.gradient, frame[h], own_head), now[h] && valid[h], D);
        });
  };
  VDCORE_NO_UNROLL
  for (int tile = warp; tile < queries.tiles * shared; tile += f.warps) gradient(False{}, queries, keys, tile);
  sync_block();
  VDCORE_NO_UNROLL
  for (int tile = warp; tile < keys.tiles; tile += f.warps) {
    gradient(True{}, keys, queries, tile);
    gradient(False{}, keys, queries, tile);
  }
  if (kMoves && g.sums) store_weight_sums<C>(g.sums, all_sums, f.warps, D);
}

template <typename E, int C>
void temporal_long_backward(const Where& where, const TemporalLongBackward& f, int64_t blocks, int shared_bytes) {
  launch(where, temporal_long_backward_kernel<E, C>, blocks, 32 * f.warps, shared_bytes, f);
}

template <typename E>
void temporal_long_backward(const Where& where, const TemporalAttentionBackward& args) {
  const TemporalAttention& a = args.forward;
  const int shared = a.heads / a.groups, D = a.head_dim, queries = a.frames.queries, keys = a.frames.keys;
  const TemporalLongBackward f{args, tiles_of(queries), tiles_of(keys), long_backward_warps(queries, keys, shared)};
  const int64_t blocks = a.lines / shared;
  const int bytes = long_backward_shared_bytes(queries, keys, D, shared);
  if (D <= 64) return temporal_long_backward<E, 2>(where, f, blocks, bytes);
  if (D <= 96) return temporal_long_backward<E, 3>(where, f, blocks, bytes);
  if (D <= 128) return temporal_long_backward<E, 4>(where, f, blocks, bytes);
  return temporal_long_backward<E, 8>(where, f, blocks, bytes);
}

}  // namespace vdcore::cuda
