// The CPU engine's operators, one table per instruction set.
#pragma once

#include "cpu/adaln/adaln.h"
#include "cpu/frame_attention/frame_attention.h"
#include "cpu/frame_attention/tangents.h"
#include "cpu/patchify/patchify.h"
#include "cpu/qk_norm_rope/qk_norm_rope.h"
#include "cpu/temporal_attention/tangents.h"
#include "cpu/tile_attention/tile_attention.h"

// Every function of the engine, and what it takes.
#define VDCORE_OPERATORS(X)                                 \
  X(frame_attention_forward, FrameAttention)                \
  X(frame_attention_backward, FrameAttention)               \
  X(frame_attention_tangents, FrameTangents)                \
  X(tile_attention_forward, TileAttention)                  \
  X(tile_attention_backward, TileAttention)                 \
  X(tile_attention_tangents, TileAttention)                 \
  X(temporal_attention_forward, TemporalAttention)          \
  X(temporal_attention_backward, TemporalAttentionBackward) \
  X(temporal_attention_tangents, TemporalTangents)          \
  X(qk_norm_rope_forward, QKNormRope)                       \
  X(qk_norm_rope_backward, QKNormRopeBackward)              \
  X(modulate_forward, Modulate)                             \
  X(modulate_backward, ModulateBackward)                    \
  X(gate_residual_forward, GateResidual)                    \
  X(gate_residual_backward, GateResidualBackward)           \
  X(tokens_from_patches, PatchProduct)                      \
  X(patches_from_tokens, PatchProduct)                      \
  X(patch_weight_gradient, PatchWeightGradient)

// Those that have a version for products of bfloat16.
#define VDCORE_AMX_OPERATORS(X)                    \
  X(frame_attention_forward, FrameAttention)       \
  X(frame_attention_backward, FrameAttention)      \
  X(frame_attention_tangents, FrameTangents)       \
  X(tile_attention_forward, TileAttention)         \
  X(tile_attention_backward, TileAttention)        \
  X(tile_attention_tangents, TileAttention)        \
  X(temporal_attention_forward, TemporalAttention) \
  X(temporal_attention_tangents, TemporalTangents) \
  X(tokens_from_patches, PatchProduct)             \
  X(patches_from_tokens, PatchProduct)             \
  X(patch_weight_gradient, PatchWeightGradient)

// Others that gain from an instruction that rounds to bfloat16.
#define VDCORE_ROUNDING_OPERATORS(X)                        \
  X(temporal_attention_backward, TemporalAttentionBackward) \
  X(qk_norm_rope_forward, QKNormRope)                       \
  X(qk_norm_rope_backward, QKNormRopeBackward)              \
  X(modulate_forward, Modulate)                             \
  X(modulate_backward, ModulateBackward)                    \
  X(gate_residual_forward, GateResidual)                    \
  X(gate_residual_backward, GateResidualBackward)

namespace vdcore::cpu {

struct Kernels {
  const char* isa;
#define VDCORE_POINTER(function, Arguments) void (*function)(const Arguments&);
  VDCORE_OPERATORS(VDCORE_POINTER)
#undef VDCORE_POINTER
  // Products of emulated tiles that the calling thread has run; -1 where tiles are real.
  int64_t (*tile_products)() = nullptr;
};

}  // namespace vdcore::cpu
