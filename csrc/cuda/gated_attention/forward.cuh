// Spatial attention of one frame, sm_80 and newer, after FlashAttention-2 (arXiv:2307.08691), with a gate in its
// epilogue.
//
// out = gate * spatial + (1 - gate) * temporal. The temporal kernel has written its result to `out`; the epilogue reads
// it back (one more tensor beside the four of the temporal pass, under the arithmetic of the last tiles) and writes the
// mix. Taking the temporal keys of a tile's positions in here instead would read every line once a frame: T times.
//
// A block of four warps takes 64 queries of a frame and head, or 128 where registers allow (two row tiles a warp halve
// the traffic of shared memory, which limits mma.sync on Hopper), and walks through the keys in tiles of 64, double
// buffered with cp.async. Queries stay in registers, keys come as rows.cuh describes, values by ldmatrix.trans.
//
//   channels            64      96     128     256
//   row tiles a warp     2       1       1       1
//   shared memory, KiB  42      50      74     138     2 stages of 64 keys and values
#pragma once

#include "cuda/core/sequences.cuh"
#include "cuda/gated_attention/gated_attention.h"

namespace vdcore::cuda {

constexpr int kTileKeys = 64, kGatedThreads = 128;

// Eight lanes read 64 bytes of two rows of keys, and 16 bytes of eight rows of values: rows must differ in their banks.
constexpr int key_pitch(int C) { return 64 * (C | 1); }
constexpr int value_pitch(int C) { return 64 * C + 16; }
constexpr int gated_shared_bytes(int C) { return 2 * kTileKeys * (key_pitch(C) + value_pitch(C)); }
constexpr int row_tiles(int C) { return C <= 2 ? 2 : 1; }

VDCORE_DEVICE Float2 load_gate(const Gate& g, int64_t at) {
  Float2 x;
  float* const both[2] = {&x.lo, &x.hi};
  VDCORE_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int64_t i = at + e * g.d;
    if (g.dtype == DType::f32)
      *both[e] = load_global<float>(g.data + 4 * i);
    else if (g.dtype == DType::f16)
      *both[e] = unpack<f16>(load_global<uint16_t>(g.data + 2 * i)).lo;
    else
      *both[e] = unpack<bf16>(load_global<uint16_t>(g.data + 2 * i)).lo;
  }
  return x;
}

template <typename E, int C>
VDCORE_KERNEL(kGatedThreads, C <= 4 ? 2 : 1)
spatial_gated_kernel(const SpatialGated a) {
  constexpr int M = row_tiles(C), kRows = 64 * M;
  const int D = a.head_dim, S = a.tokens, r = lane_row(), c = lane_column();
  const int thread = static_cast<int>(thread_index()), warp = thread / 32;
  const int tiles = (S + kRows - 1) / kRows;
  int64_t i = block_index();
  const int tile = static_cast<int>(i % tiles);
  const int32_t i_h = static_cast<int32_t>((i /= tiles) % a.heads);
  const int64_t i_t = (i /= a.heads) % a.frames, i_b = i / a.frames;
  const bool alive = !a.lengths || i_t < load_global<int64_t>(a.lengths + i_b);
  const int steps = alive ? (S + kTileKeys - 1) / kTileKeys : 0;
  const int32_t i_g = i_h / (a.heads / a.groups);
  const auto token = [&](int m, int h) { return kRows * tile + 16 * (M * warp + m) + 8 * h + r; };

  char* const keys = shared_memory();
  char* const values = keys + 2 * kTileKeys * key_pitch(C);
  const auto stage = [&](int step) {
    if (step < steps) {
      for (int piece = thread; piece < kTileKeys * 4 * C; piece += kGatedThreads) {
        const int row = piece / (4 * C), part = piece % (4 * C), key = kTileKeys * step + row;
        const bool valid = key < S;
        if (8 * part >= D) continue;
        const int at = step % 2 * kTileKeys + row, from = valid ? key : 0;
        cp_async16(keys + at * key_pitch(C) + 16 * part, a.k.row(i_b, i_t, from, i_g) + 16 * part, valid);
        cp_async16(values + at * value_pitch(C) + 16 * part, a.v.row(i_b, i_t, from, i_g) + 16 * part, valid);
      }
    }
    cp_async_commit();
  };

  stage(0);
  Rows<C> q[M][2];
  VDCORE_UNROLL
  for (int m = 0; m < M; ++m) VDCORE_UNROLL
  for (int h = 0; h < 2; ++h) load_rows(q[m][h], a.q.row(i_b, i_t, token(m, h), i_h), alive && token(m, h) < S, D);

  float sums[M][4 * C][4], highest[M][2], total[M][2];
  VDCORE_UNROLL
  for (int m = 0; m < M; ++m) {
    VDCORE_UNROLL
    for (int j = 0; j < 4 * C; ++j) VDCORE_UNROLL
    for (int e = 0; e < 4; ++e) sums[m][j][e] = 0;
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) highest[m][h] = -infinity(), total[m][h] = 0;
  }
  const float factor = a.scale * kLog2E;

  VDCORE_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    stage(step + 1);
    cp_async_wait<1>();
    sync_block();
    const char* k_tile = keys + step % 2 * kTileKeys * key_pitch(C) + r * key_pitch(C) + 16 * c;
    float s[M][8][4];
    VDCORE_UNROLL
    for (int n = 0; n < 8; ++n) {
      Rows<C> k;
      VDCORE_UNROLL
      for (int x = 0; x < C; ++x)
        k.x[x] = has_channels(x, D) ? load_shared<Vec4>(k_tile + 8 * n * key_pitch(C) + 64 * x) : Vec4{};
      VDCORE_UNROLL
      for (int m = 0; m < M; ++m) {
        VDCORE_UNROLL
        for (int e = 0; e < 4; ++e) s[m][n][e] = 0;
        inner_product<E>(s[m][n], q[m][0], q[m][1], k, D);
      }
    }
    VDCORE_UNROLL
    for (int m = 0; m < M; ++m) VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float most = highest[m][h];
      VDCORE_UNROLL
      for (int n = 0; n < 8; ++n) VDCORE_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& x = s[m][n][2 * h + e];
        x = kTileKeys * step + 8 * n + 2 * c + e < S ? x * factor : -infinity();
        most = maximum(most, x);
      }
      most = row_maximum(most);
      const float base = most == -infinity() ? 0 : most, shrink = exp2_approx(highest[m][h] - base);
      highest[m][h] = most;
      total[m][h] *= shrink;
      VDCORE_UNROLL
      for (int n = 0; n < 8; ++n) VDCORE_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& x = s[m][n][2 * h + e];
        x = exp2_approx(x - base);
        total[m][h] += x;
      }
      VDCORE_UNROLL
      for (int j = 0; j < 4 * C; ++j) sums[m][j][2 * h] *= shrink, sums[m][j][2 * h + 1] *= shrink;
    }
    // Lane i gives row i % 8 of matrix i / 8: keys 0 to 7 and 8 to 15 of eight channels, then of the next eight.
    const int lane = thread % 32;
    const char* v_tile = values + (step % 2 * kTileKeys + lane % 16) * value_pitch(C) + lane / 16 * 16;
    VDCORE_UNROLL
    for (int kk = 0; kk < 4; ++kk) {
      uint32_t p[M][4];
      VDCORE_UNROLL
      for (int m = 0; m < M; ++m) VDCORE_UNROLL
      for (int x = 0; x < 4; ++x) {
        const float* pair = &s[m][2 * kk + x / 2][x % 2 * 2];
        p[m][x] = pack<E>(pair[0], pair[1]);
      }
      VDCORE_UNROLL
      for (int j = 0; j < 4 * C; j += 2) {
        if (8 * j >= D) continue;
        uint32_t v[4];
        ldmatrix_x4_transposed(v, v_tile + 16 * kk * value_pitch(C) + 16 * j);
        VDCORE_UNROLL
        for (int m = 0; m < M; ++m) {
          mma<E>(sums[m][j], p[m], v[0], v[1]);
          if (8 * (j + 1) < D) mma<E>(sums[m][j + 1], p[m], v[2], v[3]);
        }
      }
    }
    sync_block();
  }
  cp_async_wait<0>();

  VDCORE_UNROLL
  for (int m = 0; m < M; ++m) VDCORE_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float all = row_sum(total[m][h]), each = all == 0 ? 0 : reciprocal(all);
    const int i_s = token(m, h);
    if (i_s >= S) continue;
    if (a.lse && c == 0) {
      const float base = highest[m][h] == -infinity() ? 0 : highest[m][h];
      const int64_t at = ((i_b * a.frames + i_t) * S + i_s) * a.heads + i_h;
      store_global(a.lse + at, (base + log2_approx(all)) * (1 / kLog2E));
    }
    char* const to = a.out.row(i_b, i_t, i_s, i_h);
    char* const kept = a.kept.data ? a.kept.row(i_b, i_t, i_s, i_h) : nullptr;
    const int64_t gate = i_b * a.gate.b + i_t * a.gate.t + i_s * a.gate.s + i_h * a.gate.h;
    VDCORE_UNROLL
    for (int j = 0; j < 4 * C; ++j) {
      const int channel = 8 * j + 2 * c;
      if (channel >= D) continue;
      const float lo = sums[m][j][2 * h] * each, hi = sums[m][j][2 * h + 1] * each;
      if (kept) store_global(kept + 2 * channel, pack<E>(lo, hi));
      const Float2 b = unpack<E>(load_written<uint32_t>(to + 2 * channel)),
                   g = load_gate(a.gate, gate + channel * a.gate.d);
      store_global(to + 2 * channel, pack<E>(g.lo * lo + (1 - g.lo) * b.lo, g.hi * hi + (1 - g.hi) * b.hi));
    }
  }
}

template <typename E, int C>
void spatial_gated(const Where& where, const SpatialGated& a) {
  const int64_t rows = 64 * row_tiles(C), blocks = a.batch * a.frames * a.heads * ((a.tokens + rows - 1) / rows);
  launch(where, spatial_gated_kernel<E, C>, blocks, kGatedThreads, gated_shared_bytes(C), a);
}

template <typename E>
void spatial_gated_forward_of(const Where& where, const SpatialGated& a) {
  if (a.head_dim <= 64) return spatial_gated<E, 2>(where, a);
  if (a.head_dim <= 96) return spatial_gated<E, 3>(where, a);
  if (a.head_dim <= 128) return spatial_gated<E, 4>(where, a);
  if (a.head_dim <= 256) return spatial_gated<E, 8>(where, a);
  launch_error(where, "at most 256 channels a head were expected");
}

}  // namespace vdcore::cuda
