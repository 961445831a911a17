// Spatial attention of one frame, sm_80 and newer, after FlashAttention-2 (arXiv:2307.08691), with a gate in its
// epilogue.
//
// out = gate * spatial + (1 - gate) * temporal. The temporal kernel has written its result to `out`; the epilogue reads
// it back (one more tensor beside the four of the temporal pass, under the arithmetic of the last tiles) and writes the
// mix. Taking the temporal keys of a tile's positions in here instead would read every sequence once per frame: T
// times.
//
// A block of four warps takes 64 queries of a frame and head, or 128 where registers allow (two row tiles per warp
// halve the traffic of shared memory, which limits mma.sync on Hopper), and walks through the keys in tiles of 64,
// double buffered with cp.async. Queries stay in registers, keys come as rows.cuh describes, values by ldmatrix.trans.
//
//   channels            64      96     128     256
//   row tiles per warp    2       1       1       1
//   shared memory, KiB  42      50      74     138     2 stages of 64 keys and values
#pragma once

#include "cuda/core/dispatch.h"
#include "cuda/core/softmax.cuh"
#include "cuda/gated_attention/gated_attention.h"

namespace vdcore::cuda {

constexpr int kTileKeys = 64, kGatedThreads = 128;

// Eight lanes read 64 bytes of two rows of keys, and 16 bytes of eight rows of values: rows must differ in their banks.
constexpr int key_pitch(int C) { return 64 * (C | 1); }
constexpr int value_pitch(int C) { return 64 * C + 16; }
constexpr size_t gated_shared_bytes(int C) { return 2 * kTileKeys * (key_pitch(C) + value_pitch(C)); }
constexpr int row_tiles(int C) { return C <= 2 ? 2 : 1; }

// What a warp of the kernel does. C: chunks of 32 channels.
template <typename E, int C>
struct GatedTile {
  static constexpr int M = row_tiles(C), kRows = 64 * M;
  const SpatialGated& a;
  const int D = a.head_dim, S = a.tokens, thread = static_cast<int>(thread_index()), r = lane_row(), c = lane_column();
  const int tiles = (S + kRows - 1) / kRows, tile = static_cast<int>(block_index() % tiles);
  const int64_t frame_head = static_cast<int64_t>(block_index()) / tiles, frame = frame_head / a.heads;
  const int64_t i_t = frame % a.frames, i_b = frame / a.frames;
  const int32_t i_h = static_cast<int32_t>(frame_head % a.heads), i_g = i_h / (a.heads / a.groups);
  const bool alive = !a.lengths || i_t < load_global<int64_t>(a.lengths + i_b);
  Rows<C> q[M][2];
  float sums[M][4 * C][4], highest[M][2], total[M][2];  // total: of the lane's columns

  VDCORE_DEVICE explicit GatedTile(const SpatialGated& a) : a(a) {}

  VDCORE_DEVICE int steps() const { return alive ? (S + kTileKeys - 1) / kTileKeys : 0; }
  VDCORE_DEVICE int token(int m, int h) const { return kRows * tile + 16 * (M * (thread / 32) + m) + 8 * h + r; }

  // Stages of keys and values in shared memory.
  static VDCORE_DEVICE char* keys(int step) { return shared_memory() + step % 2 * kTileKeys * key_pitch(C); }
  static VDCORE_DEVICE char* values(int step) {
    return shared_memory() + 2 * kTileKeys * key_pitch(C) + step % 2 * kTileKeys * value_pitch(C);
  }

  // Starts to copy the keys and values of a step.
  VDCORE_DEVICE void stage(int step) const {
    if (step < steps()) {
      for (int piece = thread; piece < kTileKeys * 4 * C; piece += kGatedThreads) {
        const int row = piece / (4 * C), part = piece % (4 * C), key = kTileKeys * step + row;
        const bool valid = key < S;
        if (8 * part >= D) continue;
        const int from = valid ? key : 0;
        cp_async16(keys(step) + row * key_pitch(C) + 16 * part, a.k.row(i_b, i_t, from, i_g) + 16 * part, valid);
        cp_async16(values(step) + row * value_pitch(C) + 16 * part, a.v.row(i_b, i_t, from, i_g) + 16 * part, valid);
      }
    }
    cp_async_commit();
  }

  VDCORE_DEVICE void start() {
    unroll<M>([&](int m) {
      unroll<2>([&](int h) {
        load_rows(q[m][h], a.q.row(i_b, i_t, token(m, h), i_h), alive && token(m, h) < S, D);
        highest[m][h] = -infinity(), total[m][h] = 0;
      });
      unroll<4 * C, 4>([&](int j, int e) { sums[m][j][e] = 0; });
    });
  }

  VDCORE_DEVICE void scores(int step, float (&s)[M][8][4]) const {
    const char* const k_tile = keys(step) + r * key_pitch(C) + 16 * c;
    unroll<8>([&](int n) {
      Rows<C> k;
      unroll<C>([&](int x) {
        k.x[x] = has_channels(x, D) ? load_shared<Vec4>(k_tile + 8 * n * key_pitch(C) + 64 * x) : Vec4{};
      });
      unroll<M>([&](int m) {
        unroll<4>([&](int e) { s[m][n][e] = 0; });
        inner_product<E>(s[m][n], q[m][0], q[m][1], k, D);
      });
    });
  }

  // Scores become exponentials; the sums so far shrink where a larger one comes.
  VDCORE_DEVICE void softmax(int step, float (&s)[M][8][4]) {
    const auto visible = [&](int n, int, int e) { return kTileKeys * step + 8 * n + 2 * c + e < S; };
    unroll<M, 2>([&](int m, int h) {
      const float before = highest[m][h];
      const float shrink = exp2_approx(before - exponentials(s[m], h, a.scale * kLog2E, highest[m][h], visible));
      total[m][h] = add_columns(total[m][h] * shrink, s[m], h);
      unroll<4 * C>([&](int j) { sums[m][j][2 * h] *= shrink, sums[m][j][2 * h + 1] *= shrink; });
    });
  }

  VDCORE_DEVICE void add_values(int step, const float (&s)[M][8][4]) {
    // Lane i gives row i % 8 of matrix i / 8: keys 0 to 7 and 8 to 15 of eight channels, then of the next eight.
    const int lane = thread % 32;
    const char* const v_tile = values(step) + lane % 16 * value_pitch(C) + lane / 16 * 16;
    unroll<4>([&](int kk) {
      uint32_t p[M][4];
      unroll<M, 4>([&](int m, int x) {
        const float* pair = &s[m][2 * kk + x / 2][x % 2 * 2];
        p[m][x] = pack<E>(pair[0], pair[1]);
      });
      VDCORE_UNROLL
      for (int j = 0; j < 4 * C; j += 2) {
        if (8 * j >= D) continue;
        uint32_t v[4];
        ldmatrix_x4_transposed(v, v_tile + 16 * kk * value_pitch(C) + 16 * j);
        unroll<M>([&](int m) {
          mma<E>(sums[m][j], p[m], v[0], v[1]);
          if (8 * (j + 1) < D) mma<E>(sums[m][j + 1], p[m], v[2], v[3]);
        });
      }
    });
  }

  // The mix of the result of a row with what `out` holds.
  VDCORE_DEVICE void store(int m, int h) const {
    const float all = row_sum(total[m][h]), each = inverse(all);
    const int i_s = token(m, h);
    if (i_s >= S) return;
    if (a.lse && c == 0)
      store_global(a.lse + ((i_b * a.frames + i_t) * S + i_s) * a.heads + i_h, log_sum(highest[m][h], all));
    char* const to = a.out.row(i_b, i_t, i_s, i_h);
    char* const kept = a.kept.data ? a.kept.row(i_b, i_t, i_s, i_h) : nullptr;
    const int64_t gate = a.gate.index(i_b, i_t, i_s, i_h);
    unroll<4 * C>([&](int j) {
      const int channel = 8 * j + 2 * c;
      if (channel >= D) return;
      const float lo = sums[m][j][2 * h] * each, hi = sums[m][j][2 * h + 1] * each;
      if (kept) store_global(kept + 2 * channel, pack<E>(lo, hi));
      const Float2 b = unpack<E>(load_written<uint32_t>(to + 2 * channel));
      const float g[2] = {gate_at<E>(a.gate, gate + channel * a.gate.d),
                          gate_at<E>(a.gate, gate + (channel + 1) * a.gate.d)};
      store_global(to + 2 * channel, pack<E>(g[0] * lo + (1 - g[0]) * b.lo, g[1] * hi + (1 - g[1]) * b.hi));
    });
  }
};

template <typename E, int C>
VDCORE_KERNEL(kGatedThreads, C <= 4 ? 2 : 1)
spatial_gated_kernel(const SpatialGated a) {
  GatedTile<E, C> tile(a);
  tile.stage(0);
  tile.start();
  VDCORE_NO_UNROLL
  for (int step = 0; step < tile.steps(); ++step) {
    tile.stage(step + 1);
    cp_async_wait<1>();
    sync_block();
    float s[tile.M][8][4];
    tile.scores(step, s);
    tile.softmax(step, s);
    tile.add_values(step, s);
    sync_block();
  }
  cp_async_wait<0>();
  unroll<tile.M, 2>([&](int m, int h) { tile.store(m, h); });
}

template <typename E>
void spatial_gated_forward_of(const Where& where, const SpatialGated& a) {
  with_chunks<2, 3, 4, 8>(where, a.head_dim, [&](auto chunks) {
    constexpr int C = decltype(chunks)::value;
    const int64_t rows = 64 * row_tiles(C), blocks = a.batch * a.frames * a.heads * ((a.tokens + rows - 1) / rows);
    launch(where, spatial_gated_kernel<E, C>, {blocks, kGatedThreads, gated_shared_bytes(C)}, a);
  });
}

}  // namespace vdcore::cuda
