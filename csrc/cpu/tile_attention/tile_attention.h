// Arguments of attention of tokens of a grid to windows and to listed tiles, on the CPU. Norm and rope have been
// applied.
#pragma once

#include "common/tile_plan.h"
#include "cpu/frame_attention/frame_attention.h"

namespace vdcore::cpu {

struct TileAttention {
  FrameSegment segment[2];  // video, text
  const TilePlan* plan = nullptr;
  float scale = 1;
  int threads = 1;
  float* delta = nullptr;  // backward: dout . out - dlse of every row, (B, H, rows), the video's rows first
};

}  // namespace vdcore::cpu
