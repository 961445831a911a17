// Temporal attention backward where a sequence is long, wide or shared: up to 256 frames, keys with several query
// heads, and 256 channels. Same formulas and sums as backward.cuh, other places.
//
// A block takes one sequence of keys with all query heads that share it. Queries and keys, after norm and RoPE, stay in
// shared memory; dout and v come through L1. lse of every query row is known, so that scores need not be in registers
// all at once: they are computed 16 x 16 at a time, four times in all:
//   delta = rowsum(P * dP) - dlse and then dQ = dS K of 16 query rows,
//   dV = P^T dO and dK = dS^T Q of 16 key rows and the queries of all heads.
// delta could be rowsum(dout * out) - dlse without the first of them, but out is rounded: the error of delta is one of
// all of a row's dS, and where keys have a mean it adds up in dQ to several times that of torch's softmax.
// 14 T D bytes per sequence and 10 products: beyond 64 frames arithmetic is the limit.
//
//                                 D <= 64      96      128     256
//   registers, own rows and sums       64      96      128     128     (beyond 128 channels own rows are read again)
//   shared memory, KiB, 256 frames     74     110      146       -     one query head per key head
#pragma once

#include "cuda/core/dispatch.h"
#include "cuda/temporal_attention/backward_side.cuh"

namespace vdcore::cuda {

struct TemporalLongBackward {
  TemporalAttentionBackward a;
  int32_t query_tiles, key_tiles, warps;  // tiles: of 16 rows, per head; warps: of a block
  Sequences sequences;                    // of keys
};

// Tiles of 16 rows of all heads of a side follow one another.
struct LongSide : BackwardSide {
  int tiles, heads, first_head;
};

// A block. C: chunks of 32 channels.
template <int C>
struct LongBlock {
  static constexpr Fused kFused = temporal_backward_fuses_norm_rope(32 * C) ? Fused::layer : Fused::none;
  const TemporalLongBackward& f;
  const TemporalAttentionBackward& g = f.a;
  const TemporalAttention& a = g.forward;
  const int D = a.head_dim, warp = static_cast<int>(thread_index() / 32), shared = a.heads / a.groups;
  const Sequence sequence = f.sequences.at(block_index());  // of keys
  const int64_t length = valid_frames(a.frames, sequence.b);
  // Queries, keys, lse and delta of each query row, weight sums of each warp.
  char* const k_rows = shared_memory() + shared * f.query_tiles * 16 * 64 * C;
  Vec2* const stats = reinterpret_cast<Vec2*>(k_rows + f.key_tiles * 16 * 64 * C);
  float* const block_sums = reinterpret_cast<float*>(stats + shared * f.query_tiles * 16);
  float* const warp_sums = block_sums + warp * (weight_sum_bytes(C) / 4);
  const LongSide queries{query_side(g, shared_memory()), f.query_tiles, shared, static_cast<int>(sequence.h) * shared};
  const LongSide keys{key_side(g, k_rows), f.key_tiles, 1, static_cast<int>(sequence.h)};

  VDCORE_DEVICE SequenceTile tile_of(const LongSide& side, int tile) const {
    const auto head = static_cast<uint32_t>(side.first_head + tile / side.tiles);
    return {Sequence{sequence.b, sequence.s, head}, tile % side.tiles};
  }

  template <typename E>
  VDCORE_DEVICE void stage(const LongSide& side) const {
    VDCORE_NO_UNROLL
    for (int tile = warp; tile < side.tiles * side.heads; tile += f.warps)
      stage_tile<E, C, kFused>(side, tile_of(side, tile), a.norm_rope, 16 * tile + lane_row(), D);
  }
};

enum class Gradient { q, k, v };

// The gradient of the rows of one tile. Copies what it knows of the block: registers hold it, not a stack.
template <typename E, int C, Gradient kOf>
struct LongGradient {
  static constexpr bool kKeys = kOf != Gradient::q, kValues = kOf == Gradient::v, kHeld = C <= 4;
  const LongBlock<C> block;
  const int i;  // of the tile
  const TemporalAttention& a = block.a;
  const LongSide own = kKeys ? block.keys : block.queries, other = kKeys ? block.queries : block.keys;
  const SequenceTile tile = block.tile_of(own, i);
  const int D = block.D, row = 16 * i + lane_row();  // the lane's first among its side's in shared memory
  Seen seen[2];
  Float2 own_stats[2] = {{0, 0}, {0, 0}};
  Rows<C> x[2], y[2];  // own rows, if held

  VDCORE_DEVICE LongGradient(const LongBlock<C>& block, int i) : block(block), i(i) {
    unroll<2>([&](int h) {
      const int frame = tile.frame[h];
      seen[h] = kKeys ? seen_by_key(a.frames, block.length, frame) : seen_by_query(a.frames, block.length, frame);
      if (!kHeld) return;
      load_shared_row(x[h], own.rows, row + 8 * h);
      if (!kValues) load_rows(y[h], tile.row(own.other, h), tile.has(h, own.count), D);
    });
  }

  VDCORE_DEVICE bool visible(int n, int h, int e) const { return tile.sees(seen, n % (2 * other.tiles), h, e); }

  // Tiles of eight rows of all heads of the other side.
  VDCORE_DEVICE const char* other_row(int n, bool& there) const {
    const int frame = 8 * (n % (2 * other.tiles)) + lane_row(), head = other.first_head + n / (2 * other.tiles);
    there = frame < other.count;
    return Sequence{block.sequence.b, block.sequence.s, static_cast<uint32_t>(head)}.row(other.other, frame);
  }
  VDCORE_DEVICE void load_other(Rows<C>& rows, int n) const {
    bool there;
    const char* const from = other_row(n, there);
    load_rows(rows, from, there, D);
  }

  // Scores of tile n of the other side, and products of gradients with values.
  VDCORE_DEVICE void products(int n, float (&s)[4], float (&dp)[4]) const {
    unroll<4>([&](int e) { s[e] = dp[e] = 0; });
    if constexpr (kHeld) {
      Rows<C> rows;
      load_shared_row(rows, other.rows, 8 * n + lane_row());
      inner_product<E>(s, x[0], x[1], rows, D);
      if constexpr (!kValues) {
        load_other(rows, n);
        inner_product<E>(dp, y[0], y[1], rows, D);
      }
    } else {
      bool there;
      const char* const from = other_row(n, there);
      VDCORE_UNROLL_BY(2)
      for (int i = 0; 32 * i < D; ++i) {
        Rows<1> mine[2], theirs;
        unroll<2>([&](int h) { mine[h].x[0] = load_shared<Vec4>(shared_chunk<C>(own.rows, row + 8 * h, i)); });
        theirs.x[0] = load_shared<Vec4>(shared_chunk<C>(other.rows, 8 * n + lane_row(), i));
        inner_product<E>(s, mine[0], mine[1], theirs, D);
        if constexpr (!kValues) {
          VDCORE_UNROLL
          for (int h = 0; h < 2; ++h)
            load_rows(mine[h], tile.row(own.other, h) + 64 * i, tile.has(h, own.count), D - 32 * i);
          load_rows(theirs, from + 64 * i, there, D - 32 * i);
          inner_product<E>(dp, mine[0], mine[1], theirs, D);
        }
      }
    }
  }

  VDCORE_DEVICE float probability(float score, float lse) const {
    return exp2_approx(score * (a.scale * kLog2E) - lse);
  }

  // lse and delta of the tile's queries, here and in shared memory.
  VDCORE_DEVICE void find_stats() {
    unroll<2>([&](int h) {
      if (tile.has(h, own.count))
        own_stats[h].lo = load_global<float>(a.lse + row_index(a, tile.sequence, tile.frame[h])) * kLog2E;
    });
    VDCORE_NO_UNROLL
    for (int n = 0; n < 2 * other.tiles; ++n) {
      float s[4], dp[4];
      products(n, s, dp);
      unroll<2, 2>([&](int h, int e) {
        if (visible(n, h, e)) own_stats[h].hi += probability(s[2 * h + e], own_stats[h].lo) * dp[2 * h + e];
      });
    }
    unroll<2>([&](int h) {
      own_stats[h].hi = row_sum(own_stats[h].hi);
      if (block.g.dlse && tile.has(h, own.count))
        own_stats[h].hi -= load_global<float>(block.g.dlse + row_index(a, tile.sequence, tile.frame[h]));
      if (lane_column() == 0) store_shared(block.stats + row + 8 * h, own_stats[h]);
    });
  }

  // P or dS of the columns of tiles 2 kk and 2 kk + 1 of the other side.
  VDCORE_DEVICE void weights(int kk, uint32_t (&w)[4]) const {
    unroll<2>([&](int m) {
      const int n = 2 * kk + m;
      float s[4], dp[4], weight[4];
      products(n, s, dp);
      unroll<2>([&](int e) {
        Float2 of{};
        if (kKeys) of = load_shared<Float2>(block.stats + 8 * n + 2 * lane_column() + e);
        unroll<2>([&](int h) {
          const Float2 at = kKeys ? of : own_stats[h];
          const float p = visible(n, h, e) ? probability(s[2 * h + e], at.lo) : 0;
          weight[2 * h + e] = kValues ? p : visible(n, h, e) ? p * (dp[2 * h + e] - at.hi) * a.scale : 0;
        });
      });
      unroll<2>([&](int h) { w[h + 2 * m] = pack<E>(weight[2 * h], weight[2 * h + 1]); });
    });
  }

  VDCORE_DEVICE void run() {
    if constexpr (!kKeys) find_stats();
    RowSums<C> sums;
    seen_sums<E, 0>(
        sums, 2 * other.tiles * other.heads, [&](int kk, uint32_t (&w)[4], auto&) { weights(kk, w); }, a.frames.masked,
        D,
        [&](Rows<C>& rows, int n) {
          if (kValues)
            load_other(rows, n);
          else
            load_shared_row(rows, other.rows, 8 * n + lane_row());
        },
        [&](int n, int i) {
          bool there;
          const char* const from = other_row(n, there);
          return kValues ? load_chunk(from, i, there, D)
                         : load_shared<Vec4>(shared_chunk<C>(other.rows, 8 * n + lane_row(), i));
        },
        [&](int n, int h, int e) { return visible(n, h, e); });
    if constexpr (kValues)
      store_tile<E>(sums, {1, 1}, block.g.dv, tile, own.count, D);
    else
      store_gradient<E, LongBlock<C>::kFused>(sums, own, tile, nullptr, {seen[0].any(), seen[1].any()}, a.norm_rope,
                                              block.warp_sums, block.g.sums != nullptr, D);
  }
};

template <typename E, int C>
VDCORE_KERNEL(32 * kLongBackwardWarps, 1)
temporal_long_backward_kernel(const TemporalLongBackward f) {
  const LongBlock<C> block{f};
  const LongSide &queries = block.queries, &keys = block.keys;
  if (block.kFused != Fused::none && f.a.sums) clear_weight_sums<C>(block.warp_sums);
  block.template stage<E>(queries);
  block.template stage<E>(keys);
  sync_block();
  VDCORE_NO_UNROLL
  for (int tile = block.warp; tile < queries.tiles * queries.heads; tile += f.warps)
    LongGradient<E, C, Gradient::q>(block, tile).run();
  sync_block();
  VDCORE_NO_UNROLL
  for (int tile = block.warp; tile < keys.tiles; tile += f.warps) {
    LongGradient<E, C, Gradient::v>(block, tile).run();
    LongGradient<E, C, Gradient::k>(block, tile).run();
  }
  if (block.kFused != Fused::none && f.a.sums) store_weight_sums<C>(f.a.sums, block.block_sums, f.warps, block.D);
}

template <typename E>
void temporal_long_backward(const Where& where, const TemporalAttentionBackward& args) {
  const TemporalAttention& a = args.forward;
  const int shared = a.heads / a.groups, D = a.head_dim, queries = a.frames.queries, keys = a.frames.keys;
  const TemporalLongBackward f{args, tiles_of(queries), tiles_of(keys), long_backward_warps(queries, keys, shared),
                               Sequences(a.groups, a.positions)};
  with_chunks<2, 3, 4, 8>(where, D, [&](auto chunks) {
    const size_t bytes = long_backward_shared_bytes(queries, keys, D, shared);
    launch<temporal_long_backward_kernel<E, decltype(chunks)::value>>(where,
                                                                      {a.sequences / shared, 32 * f.warps, bytes}, f);
  });
}

}  // namespace vdcore::cuda
