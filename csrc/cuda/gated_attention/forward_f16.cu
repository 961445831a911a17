#include "cuda/gated_attention/forward.cuh"

template void vdcore::cuda::spatial_gated_forward_of<vdcore::cuda::f16>(const Where&, const SpatialGated&);
