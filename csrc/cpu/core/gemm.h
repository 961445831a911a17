// Matrix products too large for one tile: the right operand packed into panels, sums that stay in registers from the
// first product to the last, and whatever is done with them then.
#pragma once

#include "cpu/core/tile.h"

namespace vdcore::cpu::VDCORE_ISA {

constexpr int64_t kPanel = 2 * W;              // columns of a panel
constexpr int64_t kBlockRows = block_rows(2);  // rows whose sums fit into the registers beside one row of a panel

VDCORE_INLINE int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Panels of B (rows, columns): out[panel][row][kPanel], 0 past the last column. B(r, c) = in[r * row + c * column].
inline void pack_panels(const float* in, int64_t row, int64_t column, int64_t rows, int64_t columns, float* out) {
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int64_t width = smaller(kPanel, columns - first);
    for (int64_t r = 0; r < rows; ++r, out += kPanel)
      for (int64_t c = 0; c < kPanel; ++c) out[c] = c < width ? in[r * row + (first + c) * column] : 0.f;
  }
}

// A block of M rows times a panel: done(m, left, right) gets the two vectors of row m.
template <int M, typename Done>
VDCORE_INLINE void multiply_block(int64_t k, Scalars a, const float* panel, const Done& done) {
  vf sum[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = vf{};
  for (int64_t i = 0; i < k; ++i) {
    const vf left = load(panel), right = load(panel + W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vf x = splat(a.data[m * a.row]);
      sum[m][0] += x * left;
      sum[m][1] += x * right;
    }
    a.data += a.column;
    panel += kPanel;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) done(m, sum[m][0], sum[m][1]);
}

template <int M, typename Done>
VDCORE_INLINE void multiply_up_to(int64_t rows, int64_t k, Scalars a, const float* panel, const Done& done) {
  if constexpr (M > 0) {
    if (rows == M)
      multiply_block<M>(k, a, panel, done);
    else
      multiply_up_to<M - 1>(rows, k, a, panel, done);
  }
}

// A (rows, k) times a panel (k, kPanel): done(row, left, right) for every row.
template <typename Done>
VDCORE_INLINE void multiply_panel(int64_t rows, int64_t k, Scalars a, const float* panel, const Done& done) {
  // Blocks of even height: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
  int64_t first = 0;
  for (int64_t blocks = (rows + kBlockRows - 1) / kBlockRows; blocks > 0; --blocks) {
    const int64_t height = (rows - first + blocks - 1) / blocks;
    multiply_up_to<kBlockRows>(height, k, a.at(first, 0), panel,
                               [&](int m, vf left, vf right)
                                   __attribute__((always_inline)) { done(first + m, left, right); });
    first += height;
  }
}

}  // namespace vdcore::cpu::VDCORE_ISA
