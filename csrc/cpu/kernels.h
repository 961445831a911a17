// The CPU engine's operators, one table per instruction set.
#pragma once

#include "cpu/temporal_attention.h"

namespace vdcore::cpu {

struct Kernels {
  const char* isa;
  void (*temporal_attention_forward)(const TemporalAttention&);
  void (*temporal_attention_backward)(const TemporalAttentionBackward&);
};

}  // namespace vdcore::cpu
