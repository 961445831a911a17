// Norm and rope alone, for kernels that read every key many times.
#pragma once

#include "cuda/arguments.h"
#include "cuda/launch.h"

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

}  // namespace vdcore::cuda
