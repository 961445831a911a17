// Products of bfloat16 matrices in tile registers, float32 sums: how their operands lie, and how they come to lie so.
//
// The left operand is read as rows, 32 terms of one after the other. The right one lies in pairs: the terms 2r and
// 2r + 1 of a column side by side, so that two rows of a matrix are interleaved. Rows come in multiples of 16, terms of
// kLeastTerms; what pads them is 0, on both sides, because 0 times a NaN is none.
#pragma once

#include "cpu/core/amx.h"
#include "cpu/core/arena.h"
#include "cpu/core/tile.h"

namespace vdcore::cpu::VDCORE_ISA {

static_assert(W == kTileRows, "a row of a tile is a vector");

#if defined(VDCORE_DOT_PRODUCTS)
constexpr int64_t kLeastTerms = 2;
#else
constexpr int64_t kLeastTerms = kTileTerms;
#endif

VDCORE_INLINE int64_t whole_rows(int64_t n) { return (n + kTileRows - 1) / kTileRows * kTileRows; }
VDCORE_INLINE int64_t whole_terms(int64_t n) { return (n + kTileTerms - 1) / kTileTerms * kTileTerms; }
VDCORE_INLINE int64_t least_terms(int64_t n) { return (n + kLeastTerms - 1) / kLeastTerms * kLeastTerms; }

// Left operand: A(m, k) = data[m * row + k].
struct Rows {
  uint16_t* data;
  int64_t row;
  VDCORE_INLINE Rows at(int64_t m, int64_t k) const { return {data + m * row + k, row}; }
};
// Right operand: B(2r, n) = data[r * row + 2n], B(2r + 1, n) = data[r * row + 2n + 1].
struct Pairs {
  uint16_t* data;
  int64_t row;
  VDCORE_INLINE Pairs at(int64_t k, int64_t n) const { return {data + k / 2 * row + 2 * n, row}; }
};

inline uint16_t* halves(Arena& arena, int64_t n) { return reinterpret_cast<uint16_t*>(arena.floats((n + 1) / 2)); }

// ---- Products ----------------------------------------------------------------------------------------------------

#if defined(VDCORE_DOT_PRODUCTS)

// M rows of N vectors of sums in registers: a pair of the left operand in every lane against N rows of the right one.
template <int M, int N>
VDCORE_INLINE void dot_block(int64_t k, Rows a, Pairs b, Tile c, bool accumulate) {
  __m512 sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[m][n] = accumulate ? load(c.at(m, n * W).data) : vf{};
  for (int64_t i = 0; i < k; i += 2, a.data += 2, b.data += b.row) {
    __m512bh right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) memcpy(&right[n], b.data + 2 * n * W, sizeof right[n]);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      memcpy(&pair, a.data + m * a.row, sizeof pair);
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], left, right[n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c.at(m, n * W).data, sum[m][n]);
}

template <int M, int N>
VDCORE_INLINE void dot_rows(int64_t rows, int64_t k, Rows a, Pairs b, Tile c, bool accumulate) {
  if constexpr (M > 0) {
    if (rows == M)
      dot_block<M, N>(k, a, b, c, accumulate);
    else
      dot_rows<M - 1, N>(rows, k, a, b, c, accumulate);
  }
}

template <int N>
__attribute__((noinline)) void dot_columns(int64_t m, int64_t k, Rows a, Pairs b, Tile c, bool accumulate) {
  constexpr int64_t kMost = block_rows(N);
  for (int64_t blocks = (m + kMost - 1) / kMost; blocks > 0; --blocks) {
    const int64_t rows = (m + blocks - 1) / blocks;  // blocks of even height
    dot_rows<kMost, N>(rows, k, a, b, c, accumulate);
    a = a.at(rows, 0);
    c = c.at(rows, 0);
    m -= rows;
  }
}

// C[0:m, 0:n] (+)= A[0:m, 0:k] B[0:k, 0:n]: m and n multiples of 16, k of kLeastTerms.
inline void product(int64_t m, int64_t n, int64_t k, Rows a, Pairs b, Tile c, bool accumulate) {
  for (int64_t vectors = n / W; vectors > 0;) {
    const int64_t panel = vectors == 1 ? 1 : (vectors == 2 || vectors == 4) ? 2 : 3;
    if (panel == 3)
      dot_columns<3>(m, k, a, b, c, accumulate);
    else if (panel == 2)
      dot_columns<2>(m, k, a, b, c, accumulate);
    else
      dot_columns<1>(m, k, a, b, c, accumulate);
    b = b.at(0, panel * W);
    c = c.at(0, panel * W);
    vectors -= panel;
  }
}

#else

// M x N registers of sums, M and N 1 or 2: 0 to 3, and 4 to 7 for the operands. Four products a term for four loads.
template <int M, int N>
inline void register_block(int64_t k, Rows a, Pairs b, Tile c, bool accumulate) {
  const int64_t c_row = c.row * 4, a_row = a.row * 2, b_row = b.row * 2;
  if (accumulate) {
    tile_load<0>(c.data, c_row);
    if constexpr (N > 1) tile_load<1>(c.at(0, kTileRows).data, c_row);
    if constexpr (M > 1) tile_load<2>(c.at(kTileRows, 0).data, c_row);
    if constexpr (M > 1 && N > 1) tile_load<3>(c.at(kTileRows, kTileRows).data, c_row);
  } else {
    tile_zero<0>();
    if constexpr (N > 1) tile_zero<1>();
    if constexpr (M > 1) tile_zero<2>();
    if constexpr (M > 1 && N > 1) tile_zero<3>();
  }
  for (int64_t i = 0; i < k; i += kTileTerms) {
    tile_load<4>(a.at(0, i).data, a_row);
    tile_load<6>(b.at(i, 0).data, b_row);
    tile_multiply<0, 4, 6>();
    if constexpr (N > 1) {
      tile_load<7>(b.at(i, kTileRows).data, b_row);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (M > 1) {
      tile_load<5>(a.at(kTileRows, i).data, a_row);
      tile_multiply<2, 5, 6>();
    }
    if constexpr (M > 1 && N > 1) tile_multiply<3, 5, 7>();
  }
  tile_store<0>(c.data, c_row);
  if constexpr (N > 1) tile_store<1>(c.at(0, kTileRows).data, c_row);
  if constexpr (M > 1) tile_store<2>(c.at(kTileRows, 0).data, c_row);
  if constexpr (M > 1 && N > 1) tile_store<3>(c.at(kTileRows, kTileRows).data, c_row);
}

// C[0:m, 0:n] (+)= A[0:m, 0:k] B[0:k, 0:n]: m and n multiples of 16, k of kLeastTerms.
inline void product(int64_t m, int64_t n, int64_t k, Rows a, Pairs b, Tile c, bool accumulate) {
  for (int64_t i = 0; i < m; i += 2 * kTileRows)
    for (int64_t j = 0; j < n; j += 2 * kTileRows) {
      const Rows left = a.at(i, 0);
      const Pairs right = b.at(0, j);
      const Tile to = c.at(i, j);
      const bool tall = m - i > kTileRows, wide = n - j > kTileRows;
      if (tall && wide)
        register_block<2, 2>(k, left, right, to, accumulate);
      else if (tall)
        register_block<2, 1>(k, left, right, to, accumulate);
      else if (wide)
        register_block<1, 2>(k, left, right, to, accumulate);
      else
        register_block<1, 1>(k, left, right, to, accumulate);
    }
}

#endif

// ---- Operands ----------------------------------------------------------------------------------------------------

VDCORE_INLINE vu load_bf16(const uint16_t* p) { return widen(*reinterpret_cast<const vu16_unaligned*>(p)); }
VDCORE_INLINE void store_words(uint16_t* p, vu x) { store(reinterpret_cast<float*>(p), reinterpret_cast<vf>(x)); }

// Rounded to nearest, ties away from 0, in the upper half of a lane; the lower half is anything.
VDCORE_INLINE vu rounded(vf x) { return reinterpret_cast<vu>(x) + 0x8000u; }
// A pair in every lane: `first` in the lower half.
VDCORE_INLINE vu pair(vf first, vf second) { return (rounded(first) >> 16) | (rounded(second) & 0xFFFF0000u); }
VDCORE_INLINE vf as_bf16(vf x) { return reinterpret_cast<vf>(rounded(x) & 0xFFFF0000u); }

// Of sums of `count` values and of their squares: their mean where it is twice their deviation or more, else 0.
VDCORE_INLINE vf large_mean(vf sum, vf squares, float count) {
  const vf mean = sum * (1.f / count);
  return select(1.25f * mean * mean * count > squares, mean, vf{});
}

// A row of n channels, in bfloat16. A last vector of less than W overlaps the one before it.
template <DType T>
VDCORE_INLINE void copy_row(const char* row, int64_t n, uint16_t* out) {
  const auto* p = reinterpret_cast<const typename Element<T>::type*>(row);
  const auto copy = [&](int64_t i) {
    if constexpr (T == DType::bf16)
      *reinterpret_cast<vu16_unaligned*>(out + i) = *reinterpret_cast<const vu16_unaligned*>(p + i);
    else
      Element<DType::bf16>::store(out + i, Element<T>::load(p + i));
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) copy(i);
  if (i == n) return;
  if (n > W) return copy(n - W);
  if constexpr (T == DType::bf16)
    memcpy(out, p, n * sizeof(uint16_t));
  else
    store_partial<DType::bf16>(out, load_partial<T>(p, n), n);
}

VDCORE_INLINE bool any_lane(vi found) {
  uint64_t lanes[W / 2], all = 0;
  memcpy(lanes, &found, sizeof lanes);
  for (const uint64_t x : lanes) all |= x;
  return all != 0;
}
// In which lanes of a row, n channels in whole vectors, there are infinity or NaN.
VDCORE_INLINE vi strange_lanes(const uint16_t* row, int64_t n) {
  vi found = {};
  for (int64_t c = 0; c < n; c += W) found |= (load_bf16(row + c) & 0x7F80u) == 0x7F80u;
  return found;
}

// 16 x 16 pairs, transposed: of rows of pairs of terms, pairs of the rows' terms.
inline void transpose_words(const uint16_t* in, int64_t in_row, uint16_t* out, int64_t out_row, uint32_t flip = 0) {
  vf x[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) x[i] = load(reinterpret_cast<const float*>(in + i * in_row));
  transpose_stages<W / 2>(x);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store_words(out + i * out_row, reinterpret_cast<vu>(x[i]) ^ flip);
}

// Rows (m, k), both whole, as the right operand of a product over k: the matrix transposed. `flip` is XORed into pairs.
inline void pack_transposed(int64_t m, int64_t k, Rows in, Pairs out, uint32_t flip = 0) {
  for (int64_t i = 0; i < m; i += kTileRows)
    for (int64_t c = 0; c < k; c += kTileTerms)
      transpose_words(in.at(i, c).data, in.row, out.at(c, i).data, out.row, flip);
}

// Rows (k, n), k even and n whole rows, as the right operand of a product over k: the matrix as it is.
inline void pack_pairs(int64_t k, int64_t n, Rows in, Pairs out) {
  for (int64_t i = 0; i < k; i += 2)
    for (int64_t c = 0; c < n; c += W)
      store_words(out.at(i, c).data, load_bf16(in.at(i, c).data) | (load_bf16(in.at(i + 1, c).data) << 16));
}

// Rows (k, n), whole terms and rows, as the left operand of a product over k: the matrix transposed.
inline void transpose_rows(int64_t k, int64_t n, Rows in, Rows out) {
  for (int64_t i = 0; i < k; i += kTileTerms)
    for (int64_t c = 0; c < n; c += kTileRows) {
      uint16_t pairs[kTileRows * kTileTerms] __attribute__((aligned(64)));
      pack_pairs(kTileTerms, kTileRows, in.at(i, c), {pairs, kTileTerms});
      transpose_words(pairs, kTileTerms, out.at(c, i).data, out.row);
    }
}

}  // namespace vdcore::cpu::VDCORE_ISA
