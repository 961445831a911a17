#include "cuda/temporal_attention/forward.cuh"

template void vdcore::cuda::temporal_attention_forward_of<vdcore::cuda::f16>(const Where&, const TemporalAttention&);
