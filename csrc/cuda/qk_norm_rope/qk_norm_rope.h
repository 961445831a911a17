// Norm and RoPE alone, for kernels that read every key many times.
#pragma once

#include "cuda/core/arguments.h"
#include "cuda/core/launch.h"

namespace vdcore::cuda {

struct RowsNormRope {
  Tokens x, y;          // y: contiguous
  int64_t rows;         // B * T * S * heads
  int64_t frame_start;  // row of the table of the first frame
  int64_t frames, positions;
  int32_t heads, head_dim;
  HeadNorm norm;
  NormRope how;
};

void rows_norm_rope(const Where& where, DType dtype, const RowsNormRope& args);

struct RowsNormRopeBackward {
  RowsNormRope forward;  // y: its gradients, of any strides
  Tokens dx;
  bool skips_zeros;  // a row of y with gradients 0 takes no part, whatever x holds there
  float* sums;       // (rows_backward_blocks, 4, D): gradients of the weight and, two parts on, the bias; or null
};

// As many blocks as keep a GPU busy, each with a row of sums.
constexpr int64_t kRowsBackwardBlocks = 1024, kRowsBackwardRows = 64;
constexpr int64_t rows_backward_blocks(int64_t rows) {
  const int64_t blocks = (rows + kRowsBackwardRows - 1) / kRowsBackwardRows;
  return blocks < kRowsBackwardBlocks ? blocks : kRowsBackwardBlocks;
}

void rows_norm_rope_backward(const Where& where, DType dtype, const RowsNormRopeBackward& args);

// Gradients of the table's cosines and sines. A cell is a frame, token and head that the table tells apart; the rows
// of a cell are shared out among `chunks` warps.
struct RopeTableBackward {
  RowsNormRopeBackward of;  // without dx and sums
  int64_t frames, tokens;   // of the table: as many as x has, or 1
  int32_t heads;
  int64_t chunks;
  float* partial;  // (chunks, 2, frames, tokens, heads, pairs)
};

void rope_table_backward(const Where& where, DType dtype, const RopeTableBackward& args);

}  // namespace vdcore::cuda
