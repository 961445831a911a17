// Compiled once per instruction set, like every file that includes vec.h: its table of operators.
#include "cpu/core/kernels.h"

#define VDCORE_STRING_(x) #x
#define VDCORE_STRING(x) VDCORE_STRING_(x)

namespace vdcore::cpu::VDCORE_ISA {

void frame_attention_forward(const FrameAttention&);
void frame_attention_backward(const FrameAttention&);
void temporal_attention_forward(const TemporalAttention&);
void temporal_attention_backward(const TemporalAttentionBackward&);
void qk_norm_rope_forward(const QKNormRope&);
void qk_norm_rope_backward(const QKNormRopeBackward&);
void modulate_forward(const Modulate&);
void modulate_backward(const ModulateBackward&);
void gate_residual_forward(const GateResidual&);
void gate_residual_backward(const GateResidualBackward&);
void tokens_from_patches(const PatchProduct&);
void patches_from_tokens(const PatchProduct&);
void patch_weight_gradient(const PatchWeightGradient&);

extern const Kernels table;
const Kernels table = {
    VDCORE_STRING(VDCORE_ISA),   frame_attention_forward, frame_attention_backward, temporal_attention_forward,
    temporal_attention_backward, qk_norm_rope_forward,    qk_norm_rope_backward,    modulate_forward,
    modulate_backward,           gate_residual_forward,   gate_residual_backward,   tokens_from_patches,
    patches_from_tokens,         patch_weight_gradient,
};

}  // namespace vdcore::cpu::VDCORE_ISA
