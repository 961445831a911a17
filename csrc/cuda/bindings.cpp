// The CUDA kernels in Python: what is checked here is what would corrupt memory. Also the module of the emulator, which
// takes CPU tensors where the other one takes CUDA's.
#include "cuda/bindings.h"

#include "cuda/bindings_call.h"
#include "cuda/bindings_frame_attention.h"
#include "cuda/gated_attention.h"
#include "cuda/qk_norm_rope.h"
#include "cuda/temporal_attention.h"
#ifdef VDCORE_EMULATE
#include "cuda/emulator.h"
#else
#include "cuda/device.h"
#endif

namespace vdcore::cuda {
namespace {

struct TemporalCall {
  Call call;
  TemporalAttention args{};
  DType dtype;

  TemporalCall(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse, py::handle lengths,
               const std::vector<int64_t>& mask, int64_t start, bool masked, float scale, py::handle norm,
               py::handle rope, uintptr_t stream)
      : call("temporal_attention", stream), dtype(strided_view(q, 5).dtype) {
    const dlpack::Tensor &shape = tensor_of(q), &keys = tensor_of(k);
    args.q = call.tokens(q), args.k = call.tokens(k), args.v = call.tokens(v), args.out = call.tokens(out);
    args.lse = call.floats(lse, 4);
    args.frames = {mask_of(mask),
                   start,
                   call.integers(lengths),
                   static_cast<int32_t>(shape.shape[1]),
                   static_cast<int32_t>(keys.shape[1]),
                   masked};
    args.lines = shape.shape[0] * shape.shape[2] * shape.shape[3];
    args.positions = shape.shape[2];
    args.heads = static_cast<int32_t>(shape.shape[3]);
    args.groups = static_cast<int32_t>(keys.shape[3]);
    args.head_dim = static_cast<int32_t>(shape.shape[4]);
    args.scale = scale;
    args.moved = call.norm_rope(norm, rope);
  }
};

void temporal_forward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse, py::handle lengths,
                      const std::vector<int64_t>& mask, int64_t start, bool masked, float scale, py::handle norm,
                      py::handle rope, uintptr_t stream) {
  const TemporalCall t(q, k, v, out, lse, lengths, mask, start, masked, scale, norm, rope, stream);
  py::gil_scoped_release unlocked;
  temporal_attention_forward(t.call.where(), t.dtype, t.args);
}

void temporal_backward(py::handle q, py::handle k, py::handle v, py::handle lengths, const std::vector<int64_t>& mask,
                       int64_t start, bool masked, float scale, py::handle dout, py::handle dlse, py::handle dq,
                       py::handle dk, py::handle dv, uintptr_t stream) {
  const py::none none;
  TemporalCall t(q, k, v, none, none, lengths, mask, start, masked, scale, none, none, stream);
  TemporalAttentionBackward args{};
  args.forward = t.args;
  args.dout = t.call.tokens(dout);
  args.dlse = t.call.floats(dlse, 4);
  args.dq = t.call.tokens(dq), args.dk = t.call.tokens(dk), args.dv = t.call.tokens(dv);
  py::gil_scoped_release unlocked;
  temporal_attention_backward(t.call.where(), t.dtype, args);
}

// `role`: 0 for queries, 1 for keys.
void rows_forward(py::handle x, py::handle y, int64_t frame_start, int role, py::handle norm, py::handle rope,
                  uintptr_t stream) {
  Call call("qk_norm_rope", stream);
  const dlpack::Tensor& shape = tensor_of(x);
  RowsNormRope args{};
  args.x = call.tokens(x), args.y = call.tokens(y);
  args.rows = shape.shape[0] * shape.shape[1] * shape.shape[2] * shape.shape[3];
  args.frame_start = frame_start;
  args.frames = shape.shape[1];
  args.positions = shape.shape[2];
  args.heads = static_cast<int32_t>(shape.shape[3]);
  args.head_dim = static_cast<int32_t>(shape.shape[4]);
  args.how = call.norm_rope(norm, rope);
  args.norm = role == 0 ? args.how.q : args.how.k;
  const DType dtype = strided_view(x, 5).dtype;
  py::gil_scoped_release unlocked;
  rows_norm_rope(call.where(), dtype, args);
}

// `gate`: expanded to q's shape.
void gated_forward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle kept, py::handle lse,
                   py::handle gate, py::handle lengths, float scale, uintptr_t stream) {
  Call call("gated_attention", stream);
  const dlpack::Tensor& shape = tensor_of(q);
  SpatialGated args{};
  args.q = call.tokens(q), args.k = call.tokens(k), args.v = call.tokens(v);
  args.out = call.tokens(out), args.kept = call.tokens(kept);
  args.lse = call.floats(lse, 4);
  const TensorView g = call.view(gate, 5);
  args.gate = {g.data, g.dtype, g.stride[0], g.stride[1], g.stride[2], g.stride[3], g.stride[4]};
  args.lengths = call.integers(lengths);
  args.batch = shape.shape[0];
  args.frames = static_cast<int32_t>(shape.shape[1]);
  args.tokens = static_cast<int32_t>(shape.shape[2]);
  args.heads = static_cast<int32_t>(shape.shape[3]);
  args.groups = static_cast<int32_t>(tensor_of(k).shape[3]);
  args.head_dim = static_cast<int32_t>(shape.shape[4]);
  args.scale = scale;
  const DType dtype = strided_view(q, 5).dtype;
  py::gil_scoped_release unlocked;
  spatial_gated_forward(call.where(), dtype, args);
}

std::optional<std::string> why_missing() {
#ifdef VDCORE_EMULATE
  return std::nullopt;
#else
  const std::string reason = missing();
  return reason.empty() ? std::nullopt : std::optional(reason);
#endif
}

}  // namespace

void define(py::module_& m) {
  m.def("cuda_missing", why_missing);
  m.def("cuda_temporal_fits", temporal_fits);
  m.def("cuda_temporal_moves", temporal_moves);
  m.def("cuda_temporal_attention_forward", temporal_forward);
  m.def("cuda_temporal_backward_fits", temporal_backward_fits);
  m.def("cuda_temporal_attention_backward", temporal_backward);
  m.def("cuda_spatial_gated_forward", gated_forward);
  m.def("cuda_rows_norm_rope", rows_forward);
  define_frame_attention(m);
}

}  // namespace vdcore::cuda

#ifdef VDCORE_EMULATE
PYBIND11_MODULE(_cuda_emulated, m, pybind11::mod_gil_not_used()) {
  m.doc() = "The CUDA kernels of vdcore, run on the CPU for tests.";
  namespace emulator = vdcore::cuda::emulator;
  vdcore::cuda::define(m);
  m.def("set_order", [](const std::string& order, uint64_t seed) {
    using Order = emulator::Order;
    emulator::set_order(order == "backward" ? Order::backward
                        : order == "random" ? Order::random
                                            : Order::forward,
                        seed);
  });
}
#endif
