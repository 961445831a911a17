// Tiles of float32 in a thread's scratch memory (L1 and L2): products and transposes.
// A tile is row-major, its rows padded to whole vectors.
#pragma once

#include "common/frame_runs.h"
#include "cpu/core/vec.h"

namespace vdcore::cpu::VDCORE_ISA {

// ---- Prefetch ----------------------------------------------------------------------------------------------------

// Products are bound by arithmetic and gathers by memory latency, and one thread alternates between them. So a product
// asks for the memory of the next gather while it runs: a few bytes per step, because a burst would fill the line
// buffers and stall. `source` hands out contiguous pieces.
struct Prefetch {
  static constexpr bool kActive = true;
  bool (*source)(void* context, const char*& at, int64_t& bytes) = nullptr;
  void* context = nullptr;
  int64_t stride = 0;  // bytes per step
  const char* at = nullptr;
  int64_t left = 0;

  VDCORE_INLINE const char* take(int64_t steps) {
    if (left <= 0 && !(source && source(context, at, left))) {
      source = nullptr;  // nothing more to fetch: touch this object, which is in L1 anyway
      at = reinterpret_cast<const char*>(this);
      stride = 0;
      left = 1;
    }
    const char* mine = at;
    at += steps * stride;
    left -= steps * stride;
    return mine;
  }
};
struct NoPrefetch {
  static constexpr bool kActive = false;
  static constexpr int64_t stride = 0;
  VDCORE_INLINE const char* take(int64_t) { return nullptr; }
};

// ---- Products ----------------------------------------------------------------------------------------------------

// Left operand of a product, read as scalars: A(m, k) = data[m * row + k * column].
struct Scalars {
  const float* data;
  int64_t row, column;
  VDCORE_INLINE Scalars at(int64_t m, int64_t k) const { return {data + m * row + k * column, row, column}; }
};
// Right operand and result, read and written as vectors.
struct Tile {
  float* data;
  int64_t row;
  VDCORE_INLINE Tile at(int64_t r, int64_t c) const { return {data + r * row + c, row}; }
};

// Register block: rows x vectors of accumulators, leaving registers for one row of B and a broadcast scalar.
constexpr int block_rows(int vectors) {
  return kRegisters == 32 ? (vectors == 1 ? 16 : vectors == 2 ? 12 : 8) : (vectors == 1 ? 12 : vectors == 2 ? 6 : 4);
}

template <int M, int V, typename P>
VDCORE_INLINE void product_block(int64_t k, Scalars a, Tile b, Tile c, bool accumulate, P& prefetch) {
  const char* ahead = prefetch.take(k);
  vf sum[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = vf{};
  for (int64_t i = 0; i < k; ++i) {
    if constexpr (P::kActive) {
      __builtin_prefetch(ahead);
      ahead += prefetch.stride;
    }
    vf row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b.data + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vf x = splat(a.data[m * a.row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] += x * row[v];
    }
    a.data += a.column;
    b.data += b.row;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* at = c.data + m * c.row + v * W;
      store(at, accumulate ? load(at) + sum[m][v] : sum[m][v]);
    }
}

// Picks the instantiation for `rows` <= M.
template <int M, int V, typename P>
VDCORE_INLINE void product_rows(int64_t rows, int64_t k, Scalars a, Tile b, Tile c, bool accumulate, P& prefetch) {
  if constexpr (M > 0) {
    if (rows == M)
      product_block<M, V>(k, a, b, c, accumulate, prefetch);
    else
      product_rows<M - 1, V>(rows, k, a, b, c, accumulate, prefetch);
  }
}

template <int V, typename P>
__attribute__((noinline)) void product_columns(int64_t m, int64_t k, Scalars a, Tile b, Tile c, bool accumulate,
                                               P& prefetch) {
  constexpr int kRows = block_rows(V);
  // Blocks of even height: 25 rows are five fives, not four sixes and a slow single one.
  for (int64_t blocks = (m + kRows - 1) / kRows; blocks > 0; --blocks) {
    const int64_t rows = (m + blocks - 1) / blocks;
    product_rows<kRows, V>(rows, k, a, b, c, accumulate, prefetch);
    a = a.at(rows, 0);
    c = c.at(rows, 0);
    m -= rows;
  }
}

// Compiled in products.cpp, not in every file that multiplies: with all their heights they take a second or two.
#define VDCORE_PRODUCTS(declare, P)                                                             \
  declare template void product_columns<1, P>(int64_t, int64_t, Scalars, Tile, Tile, bool, P&); \
  declare template void product_columns<2, P>(int64_t, int64_t, Scalars, Tile, Tile, bool, P&); \
  declare template void product_columns<3, P>(int64_t, int64_t, Scalars, Tile, Tile, bool, P&);
VDCORE_PRODUCTS(extern, Prefetch)
VDCORE_PRODUCTS(extern, NoPrefetch)

// C[0:m, 0:n] (+)= A[0:m, 0:k] B[0:k, 0:n], n a multiple of W. Columns go in panels of three vectors, or of two where
// that leaves no single one.
template <typename P>
void product(int64_t m, int64_t n, int64_t k, Scalars a, Tile b, Tile c, bool accumulate, P& prefetch) {
  for (int64_t vectors = n / W; vectors > 0;) {
    const int64_t panel = vectors == 1 ? 1 : (vectors == 2 || vectors == 4) ? 2 : 3;
    if (panel == 3)
      product_columns<3>(m, k, a, b, c, accumulate, prefetch);
    else if (panel == 2)
      product_columns<2>(m, k, a, b, c, accumulate, prefetch);
    else
      product_columns<1>(m, k, a, b, c, accumulate, prefetch);
    b = b.at(0, panel * W);
    c = c.at(0, panel * W);
    vectors -= panel;
  }
}

// C[0:m, 0:n] = A[0:m, 0:k] B[0:k, 0:n] for scores. A long sum is taken in parts of about 64 terms: rounding errors
// grow with the length of the chain of additions, and the softmax passes those of a score on to everything.
template <typename P>
void score_product(int64_t m, int64_t n, int64_t k, Scalars a, Tile b, Tile c, P& prefetch) {
  constexpr int64_t kLongest = 80;
  const int64_t parts = k <= kLongest ? 1 : (k + 63) / 64, part = (k + parts - 1) / parts;
  for (int64_t i = 0; i < k; i += part) product(m, n, smaller(part, k - i), a.at(0, i), b.at(i, 0), c, i > 0, prefetch);
}

// As product(), but row m sums over k in runs[m] only. What lies outside is not multiplied by zero, it is not read: a
// NaN in a hidden frame stays there.
template <typename P>
void product_over_runs(int64_t m, int64_t n, const Run* runs, Scalars a, Tile b, Tile c, bool accumulate, P& prefetch) {
  constexpr int64_t kRows = block_rows(3);
  for (int64_t r = 0; r < m; r += kRows) {
    const int64_t rows = smaller(kRows, m - r);
    Run common = runs[r];
    for (int64_t i = 1; i < rows; ++i) common = intersect(common, runs[r + i]);
    if (common.size() == 0) common = {runs[r].begin, runs[r].begin};
    product(rows, n, common.size(), a.at(r, common.begin), b.at(common.begin, 0), c.at(r, 0), accumulate, prefetch);
    for (int64_t i = 0; i < rows; ++i) {
      const Run run = runs[r + i];
      const Run before = {run.begin, larger(run.begin, smaller(run.end, common.begin))};
      const Run after = {larger(run.begin, common.end), run.end};
      const Run rests[] = {before, after};
      for (const Run& rest : rests)
        if (rest.size())
          product(1, n, rest.size(), a.at(r + i, rest.begin), b.at(rest.begin, 0), c.at(r + i, 0), true, prefetch);
    }
  }
}

// ---- Transpose ---------------------------------------------------------------------------------------------------

// Swaps the off-diagonal halves of every group of 2 * Distance lanes between a and b.
template <int Distance>
VDCORE_INLINE void exchange(vf& a, vf& b) {
#define VDCORE_LOW(i) (((i) & Distance) ? W + (i) - Distance : (i))
#define VDCORE_HIGH(i) (((i) & Distance) ? W + (i) : (i) + Distance)
  const vf low = VDCORE_SHUFFLE(a, b, VDCORE_LOW), high = VDCORE_SHUFFLE(a, b, VDCORE_HIGH);
#undef VDCORE_LOW
#undef VDCORE_HIGH
  a = low;
  b = high;
}

template <int Distance>
VDCORE_INLINE void transpose_stages(vf (&x)[W]) {
  if constexpr (Distance > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & Distance)) exchange<Distance>(x[i], x[i + Distance]);
    transpose_stages<Distance / 2>(x);
  }
}

// out[0:columns, 0:round_up(rows)] = factor * in[0:rows, 0:columns] transposed; lanes past `rows` are 0. `read(r, c)`
// is a vector of row r from column c on.
template <typename Read>
VDCORE_INLINE void transpose_rows(int64_t rows, int64_t columns, const Read& read, float factor, Tile out) {
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t height = smaller(W, rows - r);
    for (int64_t c = 0; c < columns; c += W) {
      vf x[W];
      if (height == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) x[i] = read(r + i, c) * factor;
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) x[i] = i < height ? read(r + i, c) * factor : vf{};
      }
      transpose_stages<W / 2>(x);
      if (columns - c >= W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(out.at(c + i, r).data, x[i]);
      } else {
        for (int64_t i = 0; i < columns - c; ++i) store(out.at(c + i, r).data, x[i]);
      }
    }
  }
}
// Of a tile.
inline void transpose(int64_t rows, int64_t columns, Tile in, float factor, Tile out) {
  transpose_rows(
      rows, columns, [&](int64_t r, int64_t c) __attribute__((always_inline)) { return load(in.at(r, c).data); },
      factor, out);
}
// Of rows of any dtype, `row` bytes apart, where they lie: `columns` is a multiple of W.
template <DType T>
void transpose_in_place(int64_t rows, int64_t columns, const char* in, int64_t row, float factor, Tile out) {
  using Value = typename Element<T>::type;
  transpose_rows(
      rows, columns,
      [&](int64_t r, int64_t c)
          __attribute__((always_inline)) { return Element<T>::load(reinterpret_cast<const Value*>(in + r * row) + c); },
      factor, out);
}

}  // namespace vdcore::cpu::VDCORE_ISA
