// Lines: one (position, head) each, all frames of it.
#pragma once

#include "cuda/core/rows.cuh"
#include "cuda/temporal_attention/temporal_attention.h"

namespace vdcore::cuda {

constexpr float kLog2E = 1.4426950408889634f;

struct Line {
  int64_t b, s;
  int32_t h;
};

VDCORE_DEVICE Line line_at(int64_t line, int64_t positions, int32_t heads) {
  // Division of 64-bit numbers costs as much as a row's norm.
  if (line < (int64_t{1} << 31) && positions < (int64_t{1} << 31)) {
    const uint32_t i = static_cast<uint32_t>(line), p = i / static_cast<uint32_t>(heads);
    const uint32_t b = p / static_cast<uint32_t>(positions);
    return {b, p - b * static_cast<uint32_t>(positions), static_cast<int32_t>(i - p * heads)};
  }
  const int64_t p = line / heads, b = p / positions;
  return {b, p - b * positions, static_cast<int32_t>(line - p * heads)};
}

// Where a query row's number is in (B, T, S, H).
VDCORE_DEVICE int64_t row_index(const TemporalAttention& a, const Line& at, int frame) {
  return ((at.b * a.frames.queries + frame) * a.positions + at.s) * a.heads + at.h;
}

// Where a row's angles are, without its pairs. `first`: row of the table of frame 0.
VDCORE_DEVICE int64_t angles_at(const NormRope& how, const Line& at, int64_t first, int frame) {
  return (first + frame) * how.table_t + at.s * how.table_s + at.h * how.table_h;
}

}  // namespace vdcore::cuda
