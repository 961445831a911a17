// Rows of frame attention's tensors, gathered into tiles.
#pragma once

#include "cpu/core/arena.h"
#include "cpu/core/softmax.h"
#include "cpu/frame_attention/frame_attention.h"

namespace vdcore::cpu::VDCORE_ISA {

constexpr int64_t kCenterValues = 64;  // at most so many say what is subtracted from all

// Calls body(row pointer, index) for the tokens of a run, which may go through several frames.
template <typename Body>
VDCORE_INLINE void for_each_row(const TensorView& x, int64_t b, int64_t head, TokenRun run, const Body& body) {
  const int64_t per_frame = x.size[2], step = x.stride[2] * size_of(x.dtype);
  int64_t frame = run.begin / per_frame, s = run.begin % per_frame;
  for (int64_t i = 0; i < run.size(); ++frame, s = 0) {
    char* row = x.at(b, frame, s, head);
    for (const int64_t end = smaller(run.size(), i + per_frame - s); i < end; ++i, row += step) body(row, i);
  }
}

// tile rows [0, run.size()) = the run's rows in float32, padding channels 0.
inline void gather_run(const TensorView& x, int64_t b, int64_t head, TokenRun run, Tile tile) {
  with_dtype(x.dtype, [&](auto type) {
    for_each_row(x, b, head, run, [&](const char* row, int64_t i) __attribute__((always_inline)) {
      read_row<decltype(type)::value>(row, x.size[4], tile.at(i, 0).data);
    });
  });
}

// The run's rows = factor * tile rows.
inline void scatter_run(const TensorView& x, int64_t b, int64_t head, TokenRun run, Tile tile, float factor) {
  with_dtype(x.dtype, [&](auto type) {
    for_each_row(x, b, head, run, [&](char* row, int64_t i) __attribute__((always_inline)) {
      write_row<decltype(type)::value>(row, x.size[4], tile.at(i, 0).data, factor);
    });
  });
}

inline void clear_run(const TensorView& x, int64_t b, int64_t head, TokenRun run) {
  const int64_t bytes = x.size[4] * size_of(x.dtype);
  for_each_row(x, b, head, run, [&](char* row, int64_t) { memset(row, 0, bytes); });
}

}  // namespace vdcore::cpu::VDCORE_ISA
