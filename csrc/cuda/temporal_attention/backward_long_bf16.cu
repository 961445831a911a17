#include "cuda/temporal_attention/backward_long.cuh"

template void vdcore::cuda::temporal_long_backward<vdcore::cuda::bf16>(const Where&, const TemporalAttentionBackward&);
