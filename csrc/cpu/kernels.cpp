// Compiled once per instruction set, like every file that includes vec.h: its table of operators.
#include "cpu/kernels.h"

#define VDCORE_STRING_(x) #x
#define VDCORE_STRING(x) VDCORE_STRING_(x)

namespace vdcore::cpu::VDCORE_ISA {

void frame_attention_forward(const FrameAttention&);
void frame_attention_backward(const FrameAttention&);
void temporal_attention_forward(const TemporalAttention&);
void temporal_attention_backward(const TemporalAttentionBackward&);

extern const Kernels table;
const Kernels table = {
    VDCORE_STRING(VDCORE_ISA),  frame_attention_forward,     frame_attention_backward,
    temporal_attention_forward, temporal_attention_backward,
};

}  // namespace vdcore::cpu::VDCORE_ISA
