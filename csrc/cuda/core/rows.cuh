// Rows of channels in registers, and products of them: what the temporal kernels are made of.
//
// A product over channels does not care in which order they come, as long as both sides agree. So a lane takes from its
// row, lane / 4, eight channels that lie together, 32 i + 8 (lane % 4) and on: one load of 16 bytes is half of what two
// mma.m16n8k16 want of it, as rows of a or as columns of b. In a product over rows, b's 8x8 blocks are transposed in
// registers; its columns are then channels in an order that leaves a lane with eight channels of a row of c that lie
// together, again 32 i + 8 (lane % 4) and on. So nothing goes through shared memory, every access is 16 bytes wide, and
// results lie as inputs do.
#pragma once

#include "cuda/core/arguments.h"
#include "cuda/core/ptx.h"

namespace vdcore::cuda {

VDCORE_DEVICE int lane_row() { return static_cast<int>(thread_index() % 32 / 4); }
VDCORE_DEVICE int lane_column() { return static_cast<int>(thread_index() % 4); }

// Row lane / 4 of eight: channels 32 i + 8 (lane % 4) and on in x[i], 0 past the head's.
template <int C>
struct Rows {
  Vec4 x[C];
};

// c of a product with 16 rows: channels 32 i + 8 (lane % 4) + 2 j and the next of row lane / 4 in x[i][j][0] and [1],
// of row lane / 4 + 8 in [2] and [3].
template <int C>
struct RowSums {
  float x[C][4][4];
};

// Whether chunk i of 32 channels holds any of D: the largest instantiation serves a range of D.
template <int C>
VDCORE_DEVICE bool has_chunk(int i, int D) {
  return C < 8 || 32 * i < D;
}
VDCORE_DEVICE bool has_channels(int i, int D) { return 32 * i + 8 * lane_column() < D; }

// `row`: where the lane's row starts.
VDCORE_DEVICE Vec4 load_chunk(const char* row, int i, bool valid, int D) {
  return load_global_or(row + 64 * i + 16 * lane_column(), valid && has_channels(i, D), 0);
}
template <int C>
VDCORE_DEVICE void load_rows(Rows<C>& r, const char* row, bool valid, int D) {
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) r.x[i] = load_chunk(row, i, valid, D);
}

// Chunk i, where that is known late: registers have no index.
template <int C>
VDCORE_DEVICE Vec4 chunk_of(const Rows<C>& r, int i) {
  Vec4 found{};
  unroll<C, 4>([&](int of, int j) { found.x[j] |= r.x[of].x[j] & (of == i ? ~uint32_t{0} : 0); });
  return found;
}

// s[16, 8] += rows (first eight, last eight) times other rows, over channels.
template <typename E, int C>
VDCORE_DEVICE void inner_product(float (&s)[4], const Rows<C>& first, const Rows<C>& last, const Rows<C>& other,
                                 int D) {
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i)
    if (has_chunk<C>(i, D)) {
      const uint32_t (&a)[4] = first.x[i].x, (&b)[4] = last.x[i].x, (&o)[4] = other.x[i].x;
      mma<E>(s, {a[0], b[0], a[1], b[1]}, o[0], o[1]);
      mma<E>(s, {a[2], b[2], a[3], b[3]}, o[2], o[3]);
    }
}

// sums[16, D] += weights[16, 16] times rows (first eight, last eight).
template <typename E, int C>
VDCORE_DEVICE void weighted_sum(RowSums<C>& sums, const uint32_t (&weights)[4], const Rows<C>& first,
                                const Rows<C>& last, int D) {
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i)
    if (has_chunk<C>(i, D)) {
      VDCORE_UNROLL
      for (int j = 0; j < 4; ++j)
        mma<E>(sums.x[i][j], weights, transpose8x8(first.x[i].x[j]), transpose8x8(last.x[i].x[j]));
    }
}

// Half h of the sums, times a factor, to the row of the lane's half.
template <typename E, int C>
VDCORE_DEVICE void store_rows(const RowSums<C>& sums, int h, float factor, char* row, bool valid, int D) {
  char* p = row + 16 * lane_column();
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) {
    Vec4 v;
    VDCORE_UNROLL
    for (int j = 0; j < 4; ++j) v.x[j] = pack<E>(sums.x[i][j][2 * h] * factor, sums.x[i][j][2 * h + 1] * factor);
    store_global_if(p + 64 * i, v, valid && has_channels(i, D));
  }
}

// f of every c of a product.
template <int C, typename F>
VDCORE_DEVICE void for_sums(RowSums<C>& sums, F f) {
  unroll<C, 4>([&](int i, int j) { f(sums.x[i][j]); });
}
template <int C>
VDCORE_DEVICE void clear(RowSums<C>& sums) {
  for_sums(sums, [](float (&x)[4]) { x[0] = x[1] = x[2] = x[3] = 0; });
}

template <int C>
VDCORE_DEVICE bool has_nan(const RowSums<C>& sums) {
  bool found = false;
  unroll<C, 4, 2>([&](int i, int j, int h) { found |= either_nan(sums.x[i][j][2 * h], sums.x[i][j][2 * h + 1]); });
  return found;
}

// Over the four lanes of a row.
VDCORE_DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
VDCORE_DEVICE float row_maximum(float x) {
  x = maximum(x, shuffle_xor(x, 1));
  return maximum(x, shuffle_xor(x, 2));
}

VDCORE_DEVICE bool row_any(bool x) { return (ballot(x) >> 4 * lane_row() & 15) != 0; }

// `i`: an element's index.
template <typename E>
VDCORE_DEVICE float gate_at(const Gate& g, int64_t i) {
  return g.wide ? load_global<float>(g.data + 4 * i) : unpack<E>(load_global<uint16_t>(g.data + 2 * i)).lo;
}

// ---- Rows in shared memory, side by side: eight lanes at a time read parts of two rows, in different banks ----

template <int C>
VDCORE_DEVICE char* shared_chunk(char* rows, int row, int i) {
  return rows + 64 * C * row + 64 * (C % 2 == 0 ? i ^ (row & 1) : i) + 16 * lane_column();
}
template <int C>
VDCORE_DEVICE void store_shared_row(char* rows, int row, const Rows<C>& r) {
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) store_shared(shared_chunk<C>(rows, row, i), r.x[i]);
}
template <int C>
VDCORE_DEVICE void load_shared_row(Rows<C>& r, char* rows, int row) {
  VDCORE_UNROLL
  for (int i = 0; i < C; ++i) r.x[i] = load_shared<Vec4>(shared_chunk<C>(rows, row, i));
}

// ---- Hidden rows ----
// A product multiplies hidden rows by 0, and 0 * NaN is NaN. So where a sum holds a NaN it is taken again without the
// infinities and NaN of its rows, and that is the sum of all rows that see none of them in its channel.

template <typename E>
VDCORE_DEVICE uint32_t ones(bool lo, bool hi) {
  constexpr uint32_t kOne = E::dtype == DType::bf16 ? 0x3f80 : 0x3c00;
  return (lo ? kOne : 0) | (hi ? kOne << 16 : 0);
}

// Leaves the finite values; 1 in the result where there were others.
template <typename E>
VDCORE_DEVICE Vec4 take_infinite(Vec4& v) {
  constexpr uint32_t kExponent = E::dtype == DType::bf16 ? 0x7f80 : 0x7c00;
  Vec4 found;
  VDCORE_UNROLL
  for (int j = 0; j < 4; ++j) {
    uint32_t& x = v.x[j];
    const bool lo = (x & kExponent) == kExponent, hi = (x >> 16 & kExponent) == kExponent;
    found.x[j] = ones<E>(lo, hi);
    x = (lo ? 0 : x & 0xffffu) | (hi ? 0 : x & 0xffff0000u);
  }
  return found;
}

// ---- Which rows see which ----

// Other frames that a frame sees: [begin, end) and those before `sink`.
struct Seen {
  int32_t begin, end, sink;
  VDCORE_DEVICE bool operator()(int frame) const {
    return (frame >= begin && frame < end) || static_cast<uint32_t>(frame) < static_cast<uint32_t>(sink);
  }
  VDCORE_DEVICE bool any() const { return begin < end || sink > 0; }
};

VDCORE_DEVICE int64_t valid_frames(const Frames& f, int64_t sample) {
  return f.lengths ? larger(load_global<int64_t>(f.lengths + sample), 0) : -1;
}

VDCORE_DEVICE Seen seen_by_query(const Frames& f, int64_t length, int t) {
  if (!f.masked) return {0, f.keys, 0};
  if (t >= f.queries || (length >= 0 && f.start + t >= length)) return {0, 0, 0};
  Run sink, window;
  const int64_t chunk = f.chunk.quotient(static_cast<uint32_t>(f.start) + t);
  f.mask.visible_of_chunk(chunk, length >= 0 ? smaller(length, f.keys) : f.keys, sink, window);
  return {static_cast<int32_t>(window.begin), static_cast<int32_t>(window.end), static_cast<int32_t>(sink.end)};
}

VDCORE_DEVICE Seen seen_by_key(const Frames& f, int64_t length, int k) {
  if (!f.masked) return {0, f.queries, 0};
  if (k >= f.keys || (length >= 0 && k >= length)) return {0, 0, 0};
  const int64_t alive = length >= 0 ? smaller(larger(length - f.start, 0), f.queries) : f.queries;
  const Run run = intersect(f.mask.seen_by_of_chunk(f.chunk.quotient(k), k, f.start, f.queries), {0, alive});
  return {static_cast<int32_t>(smaller(run.begin, f.queries)), static_cast<int32_t>(larger(run.end, 0)), 0};
}

// The weighted sums of rows over all tiles of the other side: `tiles` of them, N where that is known to the compiler,
// else N = 0. weights(kk, w, sums): of the 16 columns of tiles 2 kk and 2 kk + 1, 0 where a pair is hidden; may scale
// the sums so far. load(rows, n) loads tile n, chunk(n, i) only its channels 32 i to 32 i + 31; visible(n, h, e): row
// half h sees column 2 (lane % 4) + e of tile n. `hides`: some pair may be hidden.
template <typename E, int N, int C, typename Weights, typename Load, typename Chunk, typename Visible>
VDCORE_DEVICE void seen_sums(RowSums<C>& sums, int tiles, Weights weights, bool hides, int D, Load load, Chunk chunk,
                             Visible visible) {
  [[maybe_unused]] constexpr int kUnroll = N ? N : 1;
  const int count = N ? N : tiles;
  clear(sums);
  VDCORE_UNROLL_BY(kUnroll)
  for (int kk = 0; kk < count / 2; ++kk) {
    uint32_t w[4];
    weights(kk, w, sums);
    Rows<C> first, last;
    load(first, 2 * kk);
    load(last, 2 * kk + 1);
    weighted_sum<E>(sums, w, first, last, D);
  }
  if (!hides || !warp_any(has_nan(sums))) return;
  rare();
  VDCORE_NO_UNROLL
  for (int i = 0; i < C && has_chunk<C>(i, D); ++i) {  // past D, too: norm makes NaN of all of a row
    RowSums<1> finite, others;                         // others: how many values that are not finite a sum sees
    clear(finite);
    clear(others);
    VDCORE_UNROLL_BY(kUnroll)
    for (int kk = 0; kk < count / 2; ++kk) {
      uint32_t w[4], sees[4];
      weights(kk, w, finite);
      Rows<1> rows[2], infinite[2];
      unroll<2>([&](int m) {
        const int n = 2 * kk + m;
        rows[m].x[0] = chunk(n, i);
        infinite[m].x[0] = take_infinite<E>(rows[m].x[0]);
        unroll<2>([&](int h) { sees[h + 2 * m] = ones<E>(visible(n, h, 0), visible(n, h, 1)); });
      });
      weighted_sum<E>(finite, w, rows[0], rows[1], D);
      weighted_sum<E>(others, sees, infinite[0], infinite[1], D);
    }
    unroll<C, 4, 4>([&](int of, int j, int e) {  // no branch, which makes of `of` an index that registers do not have
      float& sum = sums.x[of][j][e];
      const bool seen = of != i || others.x[0][j][e] != 0;
      sum = seen ? sum : finite.x[0][j][e];
    });
  }
}

// Weights at hand.
template <int N>
struct GivenWeights {
  const uint32_t (&all)[N / 2][4];
  template <int C>
  VDCORE_DEVICE void operator()(int kk, uint32_t (&w)[4], const RowSums<C>&) const {
    VDCORE_UNROLL
    for (int i = 0; i < 4; ++i) w[i] = all[kk][i];
  }
};

}  // namespace vdcore::cuda
