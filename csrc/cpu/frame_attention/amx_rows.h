// Rows of frame attention's tensors as operands of products in tile registers.
#pragma once

#include "cpu/core/pairs.h"
#include "cpu/frame_attention/tiles.h"

namespace vdcore::cpu::VDCORE_ISA {

// Whether queries, keys and values are in bfloat16.
inline bool in_bf16(const FrameAttention& a) {
  for (const FrameSegment& segment : a.segment)
    for (const TensorView* x : {&segment.q, &segment.k, &segment.v})
      if (*x && x->dtype != DType::bf16) return false;
  return true;
}

// Rows [0, run.size()) of `out` = the run's rows, in bfloat16; 0 past the last channel, and in rows up to `rows`.
inline void gather_rows(const TensorView& x, int64_t b, int64_t head, TokenRun run, int64_t rows, Rows out) {
  const int64_t channels = x.size[4];
  with_dtype(x.dtype, [&](auto type) {
    for_each_row(x, b, head, run, [&](const char* row, int64_t i) __attribute__((always_inline)) {
      uint16_t* to = out.at(i, 0).data;
      copy_row<decltype(type)::value>(row, channels, to);
      memset(to + channels, 0, (out.row - channels) * sizeof(uint16_t));
    });
  });
  memset(out.at(run.size(), 0).data, 0, (rows - run.size()) * out.row * sizeof(uint16_t));
}

}  // namespace vdcore::cpu::VDCORE_ISA
