// Tiles of the other side as operands of products of bfloat16 in pairs: rows and terms come in steps of kLeastTerms.
#pragma once

#include "cpu/frame_attention/amx_rows.h"
#include "cpu/tile_attention/strange.h"

namespace vdcore::cpu::VDCORE_ISA {

inline bool in_bf16(const TileAttention& a) {
  for (const FrameSegment& segment : a.segment)
    for (const TensorView* x : {&segment.q, &segment.k, &segment.v})
      if (*x && x->dtype != DType::bf16) return false;
  return true;
}

// The runs that a unit sees, grown to whole steps: what they did not hold has to weigh 0.
struct Steps {
  Run runs[kOtherTile];
  int64_t count = 0;

  void find(const UnitView& view) {
    count = 0;
    for (int64_t i = 0; i < view.run_count; ++i) {
      const int64_t begin = view.runs[i].begin / kLeastTerms * kLeastTerms;
      const int64_t end = (view.runs[i].end + kLeastTerms - 1) / kLeastTerms * kLeastTerms;
      if (count && begin <= runs[count - 1].end)
        runs[count - 1].end = end;
      else
        runs[count++] = {begin, end};
    }
  }
  // Calls part(edge) for the parts of the view, and gap(begin, end) for what the steps hold beside them.
  template <typename Gap, typename Part>
  VDCORE_INLINE void for_parts(const UnitView& view, const Gap& gap, const Part& part) const {
    int64_t at = runs[0].begin, step = 0;
    for (int64_t i = 0; i < view.part_count; ++i) {
      const UnitView::Edge& edge = view.parts[i];
      for (; edge.begin >= runs[step].end; at = runs[++step].begin) gap(at, runs[step].end);
      gap(at, edge.begin);
      at = edge.end;
      part(edge);
    }
    gap(at, runs[step].end);
  }
};

// Finds rows with infinity or NaN, and sets them to 0.
inline void find_strange_rows(Rows rows, int64_t tokens, StrangeRows& strange) {
  strange.count = 0;
  vi found = {};
  for (int64_t j = 0; j < tokens; ++j) found |= strange_lanes(rows.at(j, 0).data, rows.row);
  if (!any_lane(found)) return;
  for (int64_t j = 0; j < tokens; ++j) {
    if (!any_lane(strange_lanes(rows.at(j, 0).data, rows.row))) continue;
    strange.rows[strange.count++] = static_cast<int32_t>(j);
    memset(rows.at(j, 0).data, 0, rows.row * sizeof(uint16_t));
  }
}

// Of weights in pairs of tokens: that of a token.
VDCORE_INLINE float weight_at(Pairs weights, int64_t token, int64_t lane) {
  return from_bf16(weights.at(token, lane).data[token % 2]);
}

// C[0:m, 0:n] += A[0:m, steps] B[steps, 0:n]: the sums stay in registers from step to step, of which a unit may have
// four or five in a tile, a dozen pairs of terms each. m a multiple of 16, n of one to three vectors.
#if defined(VDCORE_DOT_PRODUCTS)

template <int M, int N>
__attribute__((noinline)) void product_over_steps(int64_t m, const Steps& steps, Rows a, Pairs b, Tile c) {
  for (int64_t r = 0; r < m; r += M) {
    __m512 sum[M][N];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[i][n] = load(c.at(r + i, n * W).data);
    for (int64_t step = 0; step < steps.count; ++step) {
      const uint16_t* left = a.at(r, steps.runs[step].begin).data;
      const uint16_t* right = b.at(steps.runs[step].begin, 0).data;
      for (int64_t k = steps.runs[step].begin; k < steps.runs[step].end; k += 2, left += 2, right += b.row) {
        __m512bh row[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) memcpy(&row[n], right + 2 * n * W, sizeof row[n]);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          int32_t pair;
          memcpy(&pair, left + i * a.row, sizeof pair);
          const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) sum[i][n] = _mm512_dpbf16_ps(sum[i][n], x, row[n]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(c.at(r + i, n * W).data, sum[i][n]);
  }
}

VDCORE_INLINE void add_over_steps(int64_t m, int64_t n, const Steps& steps, Rows a, Pairs b, Tile c) {
  if (n == W)
    product_over_steps<16, 1>(m, steps, a, b, c);
  else if (n == 2 * W)
    product_over_steps<8, 2>(m, steps, a, b, c);
  else
    product_over_steps<8, 3>(m, steps, a, b, c);
}

#else

VDCORE_INLINE void add_over_steps(int64_t m, int64_t n, const Steps& steps, Rows a, Pairs b, Tile c) {
  for (int64_t i = 0; i < steps.count; ++i)
    product(m, n, steps.runs[i].size(), a.at(0, steps.runs[i].begin), b.at(steps.runs[i].begin, 0), c, true);
}

#endif

}  // namespace vdcore::cpu::VDCORE_ISA
