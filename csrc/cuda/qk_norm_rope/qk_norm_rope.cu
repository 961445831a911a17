// Norm and RoPE of rows of any number: eight rows per warp, 16 bytes per lane. Reads and writes every row once.
//
// Backward: 16 rows per warp, as norm_rope_backward.cuh has them; pairs of either style, the other channel of a pair
// read again, from L1.
#include "cuda/core/dispatch.h"
#include "cuda/qk_norm_rope/norm_rope_backward.cuh"
#include "cuda/qk_norm_rope/qk_norm_rope.h"

namespace vdcore::cuda {
namespace {

constexpr int kThreads = 128, kRowsPerBlock = kThreads / 32 * 8;

struct Place {
  int64_t b, t, s, h;
  VDCORE_DEVICE char* row(const Tokens& x) const { return x.row(b, t, s, h); }
};

VDCORE_DEVICE Place place_of(const RowsNormRope& a, int64_t i) {
  Place at;
  at.h = i % a.heads, i /= a.heads;
  at.s = i % a.positions, i /= a.positions;
  at.t = i % a.frames, at.b = i / a.frames;
  return at;
}

VDCORE_DEVICE int64_t angles_at(const RowsNormRope& a, const Place& at) {
  return (a.frame_start + at.t) * a.how.table_t + at.s * a.how.table_s + at.h * a.how.table_h;
}

template <typename E, int C>
VDCORE_KERNEL(kThreads, 4)
rows_norm_rope_kernel(const RowsNormRope a) {
  const int64_t i = static_cast<int64_t>(block_index()) * kRowsPerBlock + thread_index() / 32 * 8 + lane_row();
  const bool valid = i < a.rows;
  const Place at = place_of(a, i);
  Rows<C> x;
  load_rows(x, at.row(a.x), valid, a.head_dim);
  norm_rope_any<E>(x, at.row(a.x), valid, a.how, a.norm, angles_at(a, at), a.head_dim);
  char* to = at.row(a.y) + 16 * lane_column();
  VDCORE_UNROLL
  for (int chunk = 0; chunk < C; ++chunk)
    if (valid && has_channels(chunk, a.head_dim)) store_global(to + 64 * chunk, x.x[chunk]);
}

template <typename E>
VDCORE_DEVICE float channel_of(const char* row, int channel) {
  return unpack<E>(load_global<uint16_t>(row + 2 * channel)).lo;
}

// Whether a row of gradients, of which each of four lanes has a part, takes part.
template <int C>
VDCORE_DEVICE bool takes_part(const Rows<C>& dy, bool skips_zeros) {
  bool some = !skips_zeros;
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) VDCORE_UNROLL
  for (int j = 0; j < 4; ++j) some |= (dy.x[i].x[j] & 0x7fff7fffu) != 0;
  return row_changed(ballot(some), lane_row());
}

template <typename E, int C>
VDCORE_KERNEL(kThreads, 2)
rows_norm_rope_backward_kernel(const RowsNormRopeBackward f) {
  const RowsNormRope& a = f.forward;
  const NormRope& how = a.how;
  const int D = a.head_dim, warp = static_cast<int>(thread_index() / 32);
  auto* const all_sums = reinterpret_cast<float*>(shared_memory());
  float* const sums = f.sums ? all_sums + warp * (weight_sum_bytes(C) / 4) : nullptr;
  if (sums) clear_weight_sums<C>(sums);
  VDCORE_NO_UNROLL
  for (int64_t first = static_cast<int64_t>(block_index()) * kRowsBackwardRows; first < a.rows;
       first += kRowsBackwardBlocks * kRowsBackwardRows) {
    RowSums<C> g;
    const char* rows[2];
    char* to[2];
    bool valid[2], live[2];
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int64_t i = first + 16 * warp + 8 * h + lane_row();
      valid[h] = i < a.rows;
      const Place at = place_of(a, valid[h] ? i : 0);
      const int64_t table = angles_at(a, at);
      const char* const dy_row = at.row(a.y);
      rows[h] = at.row(a.x), to[h] = at.row(f.dx);
      Rows<C> dy;
      load_rows(dy, dy_row, valid[h], D);
      live[h] = takes_part(dy, f.skips_zeros) && valid[h];
      VDCORE_UNROLL
      for (int i = 0; i < C; ++i) VDCORE_UNROLL
      for (int e = 0; e < 8; ++e) {
        const Float2 both = unpack<E>(dy.x[i].x[e / 2]);
        float d = e % 2 ? both.hi : both.lo;
        const int channel = 32 * i + 8 * lane_column() + e;
        if (live[h] && how.style != RopeStyle::none && channel < 2 * how.pairs) {
          const Pair pair = pair_of(how, channel);
          const float other = channel_of<E>(dy_row, pair.other);
          const float c = load_global<float>(how.cos + table + pair.index);
          const float s = load_global<float>(how.sin + table + pair.index);
          d = d * c + (pair.upper ? -other * s : other * s);
        }
        g.x[i][e / 2][2 * h + e % 2] = d;
      }
    }
    if (how.kind != NormKind::none) norm_backward<E>(g, rows, live, how, a.norm, weight_sums_of<C>(sums, false), D);
    VDCORE_UNROLL
    for (int h = 0; h < 2; ++h) store_rows<E>(g, h, 1, to[h], valid[h], D);
  }
  if (f.sums) store_weight_sums<C>(f.sums, all_sums, kThreads / 32, D);
}

// With a pair (a, b) rotated to (a cos - b sin, b cos + a sin) and gradients (da, db) of that:
// d cos = a da + b db, d sin = a db - b da, summed over all rows of a cell. Eight rows per warp at a time.
template <typename E, int C>
VDCORE_KERNEL(kThreads, 2)
rope_table_backward_kernel(const RopeTableBackward f) {
  const RowsNormRope& a = f.of.forward;
  const NormRope& how = a.how;
  const int D = a.head_dim;
  const int64_t cells = f.frames * f.tokens * f.heads, summed = a.rows / cells;
  const int64_t i = static_cast<int64_t>(block_index()) * (kThreads / 32) + thread_index() / 32;
  if (i >= cells * f.chunks) return;
  const int64_t cell = i / f.chunks, chunk = i % f.chunks;
  const int64_t heads = a.heads / f.heads, tokens = a.positions / f.tokens, frames = a.frames / f.frames;
  float dcos[4 * C], dsin[4 * C];
  VDCORE_UNROLL
  for (int k = 0; k < 4 * C; ++k) dcos[k] = dsin[k] = 0;
  VDCORE_NO_UNROLL
  for (int64_t first = 8 * chunk; first < summed; first += 8 * f.chunks) {
    int64_t j = first + lane_row();
    const bool valid = j < summed;
    if (!valid) j = 0;
    Place at;
    at.h = cell % f.heads + j % heads, j /= heads;
    at.s = cell / f.heads % f.tokens + j % tokens, j /= tokens;
    at.t = cell / f.heads / f.tokens + j % frames, at.b = j / frames;
    const char *const row = at.row(a.x), *const dy_row = at.row(a.y);
    Rows<C> rows;
    load_rows(rows, dy_row, valid, D);
    const bool live = takes_part(rows, f.of.skips_zeros) && valid;
    load_rows(rows, row, live, D);
    const RowMoments m = moments<E>(rows, how.kind, how.eps, D);
    VDCORE_UNROLL
    for (int k = 0; k < 4 * C; ++k) {
      const int pair = 4 * k + lane_column(), lower = how.style == RopeStyle::half ? pair : 2 * pair;
      if (!live || pair >= how.pairs) continue;
      const int upper = how.style == RopeStyle::half ? pair + how.pairs : 2 * pair + 1;
      const float x = normalized_channel<E>(row, lower, m, a.norm), y = normalized_channel<E>(row, upper, m, a.norm);
      const float dx = channel_of<E>(dy_row, lower), dy = channel_of<E>(dy_row, upper);
      dcos[k] += x * dx + y * dy;
      dsin[k] += x * dy - y * dx;
    }
  }
  float* const to = f.partial + (chunk * 2 * cells + cell) * how.pairs;
  VDCORE_UNROLL
  for (int k = 0; k < 4 * C; ++k) {
    const float c = column_sum(dcos[k]), s = column_sum(dsin[k]);
    const int pair = 4 * k + lane_column();
    if (lane_row() != 0 || pair >= how.pairs) continue;
    store_global(to + pair, c);
    store_global(to + cells * how.pairs + pair, s);
  }
}

// f(E{}, C) for the dtype's element and chunks of 32 channels.
template <typename F>
void with_kernel(const Where& where, DType dtype, int D, F f) {
  with_element(where, dtype, [&](auto e) { with_chunks<4, 8>(where, D, [&](auto chunks) { f(e, chunks); }); });
}

}  // namespace

void rows_norm_rope(const Where& where, DType dtype, const RowsNormRope& args) {
  const int64_t blocks = (args.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  with_kernel(where, dtype, args.head_dim, [&](auto e, auto chunks) {
    launch(where, rows_norm_rope_kernel<decltype(e), decltype(chunks)::value>, {blocks, kThreads, 0}, args);
  });
}

void rows_norm_rope_backward(const Where& where, DType dtype, const RowsNormRopeBackward& args) {
  const int64_t blocks = rows_backward_blocks(args.forward.rows);
  with_kernel(where, dtype, args.forward.head_dim, [&](auto e, auto chunks) {
    constexpr int C = decltype(chunks)::value;
    const size_t bytes = args.sums ? kThreads / 32 * weight_sum_bytes(C) : 0;
    launch(where, rows_norm_rope_backward_kernel<decltype(e), C>, {blocks, kThreads, bytes}, args);
  });
}

void rope_table_backward(const Where& where, DType dtype, const RopeTableBackward& args) {
  const int64_t warps = args.frames * args.tokens * args.heads * args.chunks, each = kThreads / 32;
  with_kernel(where, dtype, args.of.forward.head_dim, [&](auto e, auto chunks) {
    launch(where, rope_table_backward_kernel<decltype(e), decltype(chunks)::value>,
           {(warps + each - 1) / each, kThreads, 0}, args);
  });
}

}  // namespace vdcore::cuda
