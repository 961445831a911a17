// Arguments of the tangents of temporal attention: of out and lse, from those of q, k and v as the scores see them.
#pragma once

#include "cpu/temporal_attention/temporal_attention.h"

namespace vdcore::cpu {

struct TemporalTangents {
  TemporalAttention forward;     // q and k normed and rotated; out and lse as forward left them
  TensorView dq, dk, dv;         // as q, k, v, of any dtype; each optional
  const float* dbias = nullptr;  // as bias; optional
  TensorView dout, dlse;         // as out and lse: what is computed
};

}  // namespace vdcore::cpu
