#include "cuda/temporal_attention/backward.cuh"

template void vdcore::cuda::temporal_attention_backward_of<vdcore::cuda::f16>(const Where&,
                                                                              const TemporalAttentionBackward&);
