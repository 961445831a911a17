// The CPU engine's operators, one table per instruction set.
#pragma once

#include "cpu/frame_attention.h"
#include "cpu/temporal_attention.h"

namespace vdcore::cpu {

struct Kernels {
  const char* isa;
  void (*frame_attention_forward)(const FrameAttention&);
  void (*frame_attention_backward)(const FrameAttention&);
  void (*temporal_attention_forward)(const TemporalAttention&);
  void (*temporal_attention_backward)(const TemporalAttentionBackward&);
};

}  // namespace vdcore::cpu
