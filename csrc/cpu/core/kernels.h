// The CPU engine's operators, one table per instruction set.
#pragma once

#include "cpu/adaln/adaln.h"
#include "cpu/frame_attention/frame_attention.h"
#include "cpu/patchify/patchify.h"
#include "cpu/qk_norm_rope/qk_norm_rope.h"
#include "cpu/temporal_attention/temporal_attention.h"

namespace vdcore::cpu {

struct Kernels {
  const char* isa;
  void (*frame_attention_forward)(const FrameAttention&);
  void (*frame_attention_backward)(const FrameAttention&);
  void (*temporal_attention_forward)(const TemporalAttention&);
  void (*temporal_attention_backward)(const TemporalAttentionBackward&);
  void (*qk_norm_rope_forward)(const QKNormRope&);
  void (*qk_norm_rope_backward)(const QKNormRopeBackward&);
  void (*modulate_forward)(const Modulate&);
  void (*modulate_backward)(const ModulateBackward&);
  void (*gate_residual_forward)(const GateResidual&);
  void (*gate_residual_backward)(const GateResidualBackward&);
  void (*tokens_from_patches)(const PatchProduct&);
  void (*patches_from_tokens)(const PatchProduct&);
  void (*patch_weight_gradient)(const PatchWeightGradient&);
};

}  // namespace vdcore::cpu
