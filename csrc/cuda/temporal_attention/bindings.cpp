// Temporal attention in Python.
#include "cuda/core/bindings.h"

#include <algorithm>

#include "cuda/core/bindings_call.h"
#include "cuda/temporal_attention/temporal_attention.h"

namespace vdcore::cuda {
namespace {

struct TemporalArguments {
  Call call;
  TemporalAttention args{};
  DType dtype;

  TemporalArguments(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse, py::handle lengths,
                    const std::vector<int64_t>& mask, int64_t q_start, bool masked, float scale, py::handle norm,
                    py::handle rope, uintptr_t stream)
      : call("temporal_attention", stream), dtype(strided_view(q, 5).dtype) {
    const dlpack::Tensor &shape = tensor_of(q), &keys = tensor_of(k);
    args.q = call.tokens(q), args.k = call.tokens(k), args.v = call.tokens(v), args.out = call.tokens(out);
    args.lse = call.floats(lse, 4);
    args.frames = Frames(mask_of(mask), q_start, call.integers(lengths), static_cast<int32_t>(shape.shape[1]),
                         static_cast<int32_t>(keys.shape[1]), masked);
    args.sequences = shape.shape[0] * shape.shape[2] * shape.shape[3];
    args.positions = shape.shape[2];
    args.heads = static_cast<int32_t>(shape.shape[3]);
    args.groups = static_cast<int32_t>(keys.shape[3]);
    args.head_dim = static_cast<int32_t>(shape.shape[4]);
    args.scale = scale;
    args.norm_rope = call.norm_rope(norm, rope);
  }
};

void temporal_forward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse, py::handle lengths,
                      const std::vector<int64_t>& mask, int64_t q_start, bool masked, float scale, py::handle norm,
                      py::handle rope, uintptr_t stream) {
  const TemporalArguments t(q, k, v, out, lse, lengths, mask, q_start, masked, scale, norm, rope, stream);
  py::gil_scoped_release unlocked;
  temporal_attention_forward(t.call.where(), t.dtype, t.args);
}

// `sums`: (blocks, 4, D) as `temporal_backward_blocks` counts them, or None.
void temporal_backward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse, py::handle lengths,
                       const std::vector<int64_t>& mask, int64_t q_start, bool masked, float scale, py::handle norm,
                       py::handle rope, py::handle dout, py::handle dlse, py::handle dq, py::handle dk, py::handle dv,
                       py::handle sums, uintptr_t stream) {
  TemporalArguments t(q, k, v, out, lse, lengths, mask, q_start, masked, scale, norm, rope, stream);
  TemporalAttentionBackward args{};
  args.forward = t.args;
  args.dout = t.call.tokens(dout);
  args.dlse = t.call.floats(dlse, 4);
  args.dq = t.call.tokens(dq), args.dk = t.call.tokens(dk), args.dv = t.call.tokens(dv);
  args.sums = t.call.floats(sums, 3);
  const TemporalAttention& a = args.forward;
  if (recording() && temporal_backward_is_short(std::max(a.frames.queries, a.frames.keys), a.head_dim,
                                                a.heads / a.groups))  // which computes both again
    recording()->tensors.erase(a.out.data), recording()->tensors.erase(a.lse);
  const int64_t blocks =
      temporal_backward_blocks(a.frames.queries, a.frames.keys, a.head_dim, a.heads / a.groups, a.sequences);
  if (args.sums && (tensor_of(sums).shape[0] != blocks || tensor_of(sums).shape[2] != a.head_dim))
    throw py::value_error("a workspace of " + std::to_string(blocks) + " rows was expected");
  py::gil_scoped_release unlocked;
  temporal_attention_backward(t.call.where(), t.dtype, args);
}

}  // namespace

void define_temporal_attention(py::module_& m) {
  using namespace py::literals;
  m.def("temporal_fits", temporal_fits, "queries"_a, "keys"_a, "channels"_a);
  m.def("temporal_fuses_norm_rope", temporal_fuses_norm_rope, "queries"_a, "keys"_a, "channels"_a);
  m.def("temporal_attention_forward", temporal_forward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "lengths"_a, "mask"_a,
        "q_start"_a, "masked"_a, "scale"_a, "norm"_a, "rope"_a, "stream"_a);
  m.def("temporal_backward_fits", temporal_backward_fits, "queries"_a, "keys"_a, "channels"_a, "shared"_a, "most"_a);
  m.def("temporal_backward_fuses_norm_rope", temporal_backward_fuses_norm_rope, "channels"_a);
  m.def("temporal_backward_blocks", temporal_backward_blocks, "queries"_a, "keys"_a, "channels"_a, "shared"_a,
        "sequences"_a);
  m.def("temporal_attention_backward", temporal_backward, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "lengths"_a, "mask"_a,
        "q_start"_a, "masked"_a, "scale"_a, "norm"_a, "rope"_a, "dout"_a, "dlse"_a, "dq"_a, "dk"_a, "dv"_a, "sums"_a,
        "stream"_a);
}

}  // namespace vdcore::cuda
