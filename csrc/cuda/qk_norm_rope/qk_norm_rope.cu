// Norm and RoPE of rows of any number: eight rows per warp, 16 bytes per lane. Reads and writes every row once.
//
// Pairs of neighbouring channels are rotated in registers. Of pairs whose channels lie half the table's width apart,
// the other one is exchanged through shared memory, four channels at a time, in float32. A table of another number of
// pairs than a multiple of four is read channel by channel, and so is the other channel of its pairs, from L1.
//
// Backward: 16 rows per warp, as norm_rope_backward.cuh has them, and the gradients of pairs in the same three ways.
#include "cuda/core/dispatch.h"
#include "cuda/qk_norm_rope/norm_rope_backward.cuh"
#include "cuda/qk_norm_rope/qk_norm_rope.h"

namespace vdcore::cuda {
namespace {

constexpr int kThreads = 128, kRowsPerBlock = kThreads / 32 * 8;

// Which channels a rotation mixes, and how they are read; `any`: one by one.
enum class Pairs { neighbours, halves, any };
Pairs pairs_of(const NormRope& how) {
  const bool whole = how.style == RopeStyle::none || how.pairs % 4 == 0;
  return !whole ? Pairs::any : how.style == RopeStyle::half ? Pairs::halves : Pairs::neighbours;
}

struct Place {
  uint32_t b, t, s, h;
  VDCORE_DEVICE char* row(const Tokens& x) const { return x.row(b, t, s, h); }
};

// Rows by their number, heads fastest: less than 2^31 of them.
struct Places {
  Divider heads, positions, frames;

  explicit Places(const RowsNormRope& a) : heads(a.heads), positions(a.positions), frames(a.frames) {}
  VDCORE_DEVICE Place at(uint32_t i) const {
    const uint32_t h = heads.split(i), s = positions.split(i), t = frames.split(i);
    return {i, t, s, h};
  }
};

VDCORE_DEVICE int64_t angles_at(const RowsNormRope& a, const Place& at) {
  return Tokens::offset(static_cast<uint32_t>(a.frame_start) + at.t, a.how.table_t) +
         Tokens::offset(at.s, a.how.table_s) + Tokens::offset(at.h, a.how.table_h);
}

// ---- Pairs of halves: float32 rows of a warp in shared memory, 16 bytes more apart than they are long, so that eight
// lanes touch different banks ----

constexpr int exchange_pitch(int C) { return 128 * C + 16; }
constexpr size_t exchange_bytes(int C) { return kThreads / 32 * 8 * exchange_pitch(C); }

// Rotates x, the lane's channels of its row; `direction` -1: back. `rows`: of the warp. All lanes of a warp call it.
template <int C>
VDCORE_DEVICE void rotate_halves(float (&x)[C][8], bool there, const NormRope& how, int64_t table, float direction,
                                 char* rows, int D) {
  char* const row = rows + lane_row() * exchange_pitch(C);
  sync_warp();  // of the rows before, too
  unroll<C, 2>([&](int i, int four) {
    const int first = 32 * i + 8 * lane_column() + 4 * four;
    const float* const y = x[i] + 4 * four;
    if (first < D) store_shared(row + 4 * first, Vec4{{as_bits(y[0]), as_bits(y[1]), as_bits(y[2]), as_bits(y[3])}});
  });
  sync_warp();
  unroll<C, 2>([&](int i, int four) {
    const int first = 32 * i + 8 * lane_column() + 4 * four;
    const bool lower = first < how.pairs, rotates = there && first < 2 * how.pairs;
    const int pair = lower ? first : first - how.pairs;
    const Vec4 c = load_global_or(how.cos + table + pair, rotates, 0);
    const Vec4 s = load_global_or(how.sin + table + pair, rotates, 0);
    if (!rotates) return;
    const Vec4 other = load_shared<Vec4>(row + 4 * (lower ? pair + how.pairs : pair));
    const float sign = lower ? -direction : direction;
    unroll<4>([&](int j) {
      float& y = x[i][4 * four + j];
      y = fmaf(y, as_float(c.x[j]), sign * as_float(other.x[j]) * as_float(s.x[j]));
    });
  });
}

constexpr int rows_blocks_per_sm(int C) { return C == 2 ? 6 : C == 4 ? 5 : 3; }  // as many as without a spill

struct RowsForward {
  RowsNormRope a;
  Places places;
};

template <typename E, int C, Pairs kPairs>
VDCORE_KERNEL(kThreads, rows_blocks_per_sm(C))
rows_norm_rope_kernel(const RowsForward f) {
  const RowsNormRope& a = f.a;
  const uint32_t warp = thread_index() / 32, i = block_index() * kRowsPerBlock + warp * 8 + lane_row();
  const bool there = i < a.rows;
  const Place at = f.places.at(there ? i : 0);
  const char* const row = at.row(a.x);
  const int64_t table = angles_at(a, at);
  const int D = a.head_dim;
  Rows<C> x[1];
  load_rows(x[0], row, there, D);
  if constexpr (kPairs == Pairs::neighbours) {
    const RowMoments m[1] = {moments<E, true>(x[0], there, a.how.kind, a.how.eps, D)};
    norm_rope<E, true, false>(x, m, {there}, a.how, a.norm, {table}, D);
  } else if constexpr (kPairs == Pairs::halves) {
    const RowMoments m = moments<E, true>(x[0], there, a.how.kind, a.how.eps, D);
    float y[C][8];
    VDCORE_UNROLL
    for (int chunk = 0; chunk < C; ++chunk) {
      const WeightBias<true> of(a.norm, chunk, D);
      unroll<8>([&](int e) {
        const Float2 both = unpack<E>(x[0].x[chunk].x[e / 2]);
        y[chunk][e] = of(m, e % 2 ? both.hi : both.lo, e);
      });
    }
    rotate_halves<C>(y, there, a.how, table, 1, shared_memory() + warp * 8 * exchange_pitch(C), D);
    unroll<C, 4>([&](int chunk, int j) { x[0].x[chunk].x[j] = pack<E>(y[chunk][2 * j], y[chunk][2 * j + 1]); });
  } else {
    norm_rope_any<E>(x[0], row, there, a.how, a.norm, table, D);
  }
  char* const to = at.row(a.y) + 16 * lane_column();
  VDCORE_UNROLL
  for (int chunk = 0; chunk < C; ++chunk)
    if (there && has_channels(chunk, D)) store_global(to + 64 * chunk, x[0].x[chunk]);
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
  return row_any(some);
}

struct RowsBackward {
  RowsNormRopeBackward of;
  Places places;
};

// Gradients of the rotated row become those of the row before: half h of g.
template <typename E, Pairs kPairs, int C>
VDCORE_DEVICE void rotate_back(RowSums<C>& g, int h, const Rows<C>& dy, const char* dy_row, bool live,
                               const NormRope& how, int64_t table, char* rows, int D) {
  float d[C][8];
  unroll<C, 4>([&](int i, int j) {
    const Float2 both = unpack<E>(dy.x[i].x[j]);
    d[i][2 * j] = both.lo, d[i][2 * j + 1] = both.hi;
  });
  if constexpr (kPairs == Pairs::halves) {
    rotate_halves<C>(d, live, how, table, -1, rows, D);
  } else if constexpr (kPairs == Pairs::any) {
    unroll<C, 8>([&](int i, int e) {
      const int channel = 32 * i + 8 * lane_column() + e;
      if (!live || how.style == RopeStyle::none || channel >= 2 * how.pairs) return;
      const Pair pair = pair_of(how, channel);
      const float other = channel_of<E>(dy_row, pair.other);
      const float c = load_global<float>(how.cos + table + pair.index);
      const float s = load_global<float>(how.sin + table + pair.index);
      d[i][e] = d[i][e] * c + (pair.upper ? -other * s : other * s);
    });
  }
  unroll<C, 8>([&](int i, int e) { g.x[i][e / 2][2 * h + e % 2] = d[i][e]; });
  if constexpr (kPairs == Pairs::neighbours) rope_backward<false, true>(g, h, live, how, table);
}

template <typename E, int C, Pairs kPairs>
VDCORE_KERNEL(kThreads, 2)
rows_norm_rope_backward_kernel(const RowsBackward f) {
  const RowsNormRope& a = f.of.forward;
  const NormRope& how = a.how;
  const int D = a.head_dim, warp = static_cast<int>(thread_index() / 32);
  auto* const all_sums = reinterpret_cast<float*>(shared_memory());
  float* const sums = all_sums + warp * (weight_sum_bytes(C) / 4);
  char* const rows_of_warp = shared_memory() + kThreads / 32 * weight_sum_bytes(C) + warp * 8 * exchange_pitch(C);
  if (f.of.sums) clear_weight_sums<C>(sums);
  VDCORE_NO_UNROLL
  for (int64_t first = static_cast<int64_t>(block_index()) * kRowsBackwardRows; first < a.rows;
       first += kRowsBackwardBlocks * kRowsBackwardRows) {
    RowSums<C> g;
    const char* rows[2];
    char* to[2];
    bool there[2], live[2];
    int64_t table[2];
    Rows<C> dy[2];
    const char* dy_row[2];
    unroll<2>([&](int h) {
      const int64_t i = first + 16 * warp + 8 * h + lane_row();
      there[h] = i < a.rows;
      const Place at = f.places.at(there[h] ? static_cast<uint32_t>(i) : 0);
      table[h] = angles_at(a, at);
      dy_row[h] = at.row(a.y), rows[h] = at.row(a.x), to[h] = at.row(f.of.dx);
      load_rows(dy[h], dy_row[h], there[h], D);
    });
    unroll<2>([&](int h) {
      live[h] = takes_part(dy[h], f.of.skips_zeros) && there[h];
      rotate_back<E, kPairs>(g, h, dy[h], dy_row[h], live[h], how, table[h], rows_of_warp, D);
    });
    if (how.kind != NormKind::none) {
      Rows<C> x[2];
      RowMoments m[2];
      unroll<2>([&](int h) { load_rows(x[h], rows[h], live[h], D); });
      moments<E, true>(m, x, live, how.kind, how.eps, D);
      norm_backward<E, true>(g, x, m, how, a.norm, weight_sums_of<C>(sums, false, f.of.sums != nullptr), D);
    }
    unroll<2>([&](int h) { store_rows<E>(g, h, 1, to[h], there[h], D); });
  }
  if (f.of.sums) store_weight_sums<C>(f.of.sums, all_sums, kThreads / 32, D);
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
    at.h = static_cast<uint32_t>(cell % f.heads + j % heads), j /= heads;
    at.s = static_cast<uint32_t>(cell / f.heads % f.tokens + j % tokens), j /= tokens;
    at.t = static_cast<uint32_t>(cell / f.heads / f.tokens + j % frames), at.b = static_cast<uint32_t>(j / frames);
    const char *const row = at.row(a.x), *const dy_row = at.row(a.y);
    Rows<C> rows;
    load_rows(rows, dy_row, valid, D);
    const bool live = takes_part(rows, f.of.skips_zeros) && valid;
    load_rows(rows, row, live, D);
    const RowMoments m = moments<E, true>(rows, live, how.kind, how.eps, D);
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
template <int... kChunks, typename F>
void with_kernel(const Where& where, DType dtype, int D, F f) {
  with_element(where, dtype, [&](auto e) { with_chunks<kChunks...>(where, D, [&](auto chunks) { f(e, chunks); }); });
}

template <typename E, int C, Pairs kPairs>
void rows_forward(const Where& where, const RowsForward& f) {
  launch<rows_norm_rope_kernel<E, C, kPairs>>(
      where,
      {(f.a.rows + kRowsPerBlock - 1) / kRowsPerBlock, kThreads, kPairs == Pairs::halves ? exchange_bytes(C) : 0}, f);
}

template <typename E, int C, Pairs kPairs>
void rows_backward(const Where& where, const RowsBackward& f) {
  const bool halves = kPairs == Pairs::halves;
  const size_t sums = f.of.sums || halves ? kThreads / 32 * weight_sum_bytes(C) : 0;
  launch<rows_norm_rope_backward_kernel<E, C, kPairs>>(
      where, {rows_backward_blocks(f.of.forward.rows), kThreads, sums + (halves ? exchange_bytes(C) : 0)}, f);
}

}  // namespace

void rows_norm_rope(const Where& where, DType dtype, const RowsNormRope& args) {
  const RowsForward f{args, Places(args)};
  const Pairs pairs = pairs_of(args.how);
  if (pairs == Pairs::any)
    return with_kernel<8>(where, dtype, args.head_dim, [&](auto e, auto chunks) {
      rows_forward<decltype(e), decltype(chunks)::value, Pairs::any>(where, f);
    });
  with_kernel<2, 4, 8>(where, dtype, args.head_dim, [&](auto e, auto chunks) {
    constexpr int C = decltype(chunks)::value;
    if (pairs == Pairs::halves) return rows_forward<decltype(e), C, Pairs::halves>(where, f);
    rows_forward<decltype(e), C, Pairs::neighbours>(where, f);
  });
}

void rows_norm_rope_backward(const Where& where, DType dtype, const RowsNormRopeBackward& args) {
  const RowsBackward f{args, Places(args.forward)};
  const Pairs pairs = pairs_of(args.forward.how);
  if (pairs == Pairs::any)
    return with_kernel<8>(where, dtype, args.forward.head_dim, [&](auto e, auto chunks) {
      rows_backward<decltype(e), decltype(chunks)::value, Pairs::any>(where, f);
    });
  with_kernel<4, 8>(where, dtype, args.forward.head_dim, [&](auto e, auto chunks) {
    constexpr int C = decltype(chunks)::value;
    if (pairs == Pairs::halves) return rows_backward<decltype(e), C, Pairs::halves>(where, f);
    rows_backward<decltype(e), C, Pairs::neighbours>(where, f);
  });
}

void rope_table_backward(const Where& where, DType dtype, const RopeTableBackward& args) {
  const int64_t warps = args.frames * args.tokens * args.heads * args.chunks, each = kThreads / 32;
  with_kernel<4, 8>(where, dtype, args.of.forward.head_dim, [&](auto e, auto chunks) {
    launch<rope_table_backward_kernel<decltype(e), decltype(chunks)::value>>(
        where, {(warps + each - 1) / each, kThreads, 0}, args);
  });
}

}  // namespace vdcore::cuda
