// The Python module vdcore._cuda, and vdcore._cuda_emulated, which takes CPU tensors where the other one takes CUDA's.
// What is checked here is what would corrupt memory.
#include "cuda/frame_attention/bindings.h"

#include "cuda/core/bindings_call.h"
#include "cuda/gated_attention/gated_attention.h"
#include "cuda/qk_norm_rope/qk_norm_rope.h"
#include "cuda/temporal_attention/temporal_attention.h"
#ifdef VDCORE_EMULATE
#include "emulator/emulator.h"
#else
#include "cuda/core/device.h"
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

// `sums`: (blocks, 4, D) as `cuda_temporal_backward_blocks` counts them, or None.
void temporal_backward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse, py::handle lengths,
                       const std::vector<int64_t>& mask, int64_t start, bool masked, float scale, py::handle norm,
                       py::handle rope, py::handle dout, py::handle dlse, py::handle dq, py::handle dk, py::handle dv,
                       py::handle sums, uintptr_t stream) {
  TemporalCall t(q, k, v, out, lse, lengths, mask, start, masked, scale, norm, rope, stream);
  TemporalAttentionBackward args{};
  args.forward = t.args;
  args.dout = t.call.tokens(dout);
  args.dlse = t.call.floats(dlse, 4);
  args.dq = t.call.tokens(dq), args.dk = t.call.tokens(dk), args.dv = t.call.tokens(dv);
  args.sums = t.call.floats(sums, 3);
  const TemporalAttention& a = args.forward;
  const int64_t blocks =
      temporal_backward_blocks(a.frames.queries, a.frames.keys, a.head_dim, a.heads / a.groups, a.lines);
  if (args.sums && (tensor_of(sums).shape[0] != blocks || tensor_of(sums).shape[2] != a.head_dim))
    throw py::value_error("a workspace of " + std::to_string(blocks) + " rows was expected");
  py::gil_scoped_release unlocked;
  temporal_attention_backward(t.call.where(), t.dtype, args);
}

// `role`: 0 for queries, 1 for keys; y is the result, or its gradients.
struct RowsCall {
  Call call;
  RowsNormRope args{};
  DType dtype;

  RowsCall(py::handle x, py::handle y, int64_t frame_start, int role, py::handle norm, py::handle rope,
           uintptr_t stream)
      : call("qk_norm_rope", stream), dtype(strided_view(x, 5).dtype) {
    const dlpack::Tensor& shape = tensor_of(x);
    args.x = call.tokens(x), args.y = call.tokens(y);
    args.rows = shape.shape[0] * shape.shape[1] * shape.shape[2] * shape.shape[3];
    args.frame_start = frame_start;
    args.frames = shape.shape[1];
    args.positions = shape.shape[2];
    args.heads = static_cast<int32_t>(shape.shape[3]);
    args.head_dim = static_cast<int32_t>(shape.shape[4]);
    args.how = call.norm_rope(norm, rope);
    args.norm = role == 0 ? args.how.q : args.how.k;
  }
};

void rows_forward(py::handle x, py::handle y, int64_t frame_start, int role, py::handle norm, py::handle rope,
                  uintptr_t stream) {
  const RowsCall r(x, y, frame_start, role, norm, rope, stream);
  py::gil_scoped_release unlocked;
  rows_norm_rope(r.call.where(), r.dtype, r.args);
}

// `sums`: (blocks, 4, D) as `cuda_rows_backward_blocks` counts them, or None.
void rows_backward(py::handle x, py::handle dy, py::handle dx, py::handle sums, int64_t frame_start, int role,
                   py::handle norm, py::handle rope, bool skips_zeros, uintptr_t stream) {
  RowsCall r(x, dy, frame_start, role, norm, rope, stream);
  const RowsNormRopeBackward args{r.args, r.call.tokens(dx), skips_zeros, r.call.floats(sums, 3)};
  if (args.sums &&
      (tensor_of(sums).shape[0] != rows_backward_blocks(r.args.rows) || tensor_of(sums).shape[2] != r.args.head_dim))
    throw py::value_error("a workspace of " + std::to_string(rows_backward_blocks(r.args.rows)) + " rows was expected");
  py::gil_scoped_release unlocked;
  rows_norm_rope_backward(r.call.where(), r.dtype, args);
}

// `partial`: (chunks, 2, frames * tokens * heads, pairs); frames, tokens and heads of the table that differ.
void table_backward(py::handle x, py::handle dy, py::handle partial, int64_t frames, int64_t tokens, int32_t heads,
                    int role, py::handle norm, py::handle rope, bool skips_zeros, uintptr_t stream) {
  RowsCall r(x, dy, 0, role, norm, rope, stream);
  const RopeTableBackward args{{r.args, {}, skips_zeros, nullptr}, frames, tokens, heads, tensor_of(partial).shape[0],
                               r.call.floats(partial, 4)};
  py::gil_scoped_release unlocked;
  rope_table_backward(r.call.where(), r.dtype, args);
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

void define(py::module_& m) {
  m.def("cuda_missing", why_missing);
  m.def("cuda_temporal_fits", temporal_fits);
  m.def("cuda_temporal_moves", temporal_moves);
  m.def("cuda_temporal_attention_forward", temporal_forward);
  m.def("cuda_temporal_backward_fits", temporal_backward_fits);
  m.def("cuda_temporal_backward_moves", temporal_backward_moves);
  m.def("cuda_temporal_backward_blocks", temporal_backward_blocks);
  m.def("cuda_temporal_attention_backward", temporal_backward);
  m.def("cuda_spatial_gated_forward", gated_forward);
  m.def("cuda_rows_norm_rope", rows_forward);
  m.def("cuda_rows_backward_blocks", rows_backward_blocks);
  m.def("cuda_rows_norm_rope_backward", rows_backward);
  m.def("cuda_rope_table_backward", table_backward);
  define_frame_attention(m);
}

}  // namespace
}  // namespace vdcore::cuda

#ifdef VDCORE_EMULATE
PYBIND11_MODULE(_cuda_emulated, m, pybind11::mod_gil_not_used()) {
  m.doc() = "vdcore's CUDA kernels, run on the CPU for tests.";
  namespace emulator = vdcore::cuda::emulator;
  vdcore::cuda::define(m);
  m.def("set_order", [](const std::string& order, uint64_t seed) {
    using Order = emulator::Order;
    emulator::set_order(order == "backward" ? Order::backward
                        : order == "random" ? Order::random
                                            : Order::forward,
                        seed);
  });
  m.def("set_edges", emulator::set_edges);
}
#else
PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) {
  m.doc() = "vdcore's CUDA kernels. Use the functions of vdcore instead: they check their arguments.";
  vdcore::cuda::define(m);
}
#endif
