// Norm and RoPE in Python.
#include "cuda/core/bindings.h"

#include "cuda/core/bindings_call.h"
#include "cuda/qk_norm_rope/qk_norm_rope.h"

namespace vdcore::cuda {
namespace {

// `role`: 0 for queries, 1 for keys; y is the result, or its gradients.
struct RowsArguments {
  Call call;
  RowsNormRope args{};
  DType dtype;

  RowsArguments(py::handle x, py::handle y, int64_t frame_start, int role, py::handle norm, py::handle rope,
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
  const RowsArguments r(x, y, frame_start, role, norm, rope, stream);
  py::gil_scoped_release unlocked;
  rows_norm_rope(r.call.where(), r.dtype, r.args);
}

// `sums`: (blocks, 4, D) as `rows_backward_blocks` counts them, or None.
void rows_backward(py::handle x, py::handle dy, py::handle dx, py::handle sums, int64_t frame_start, int role,
                   py::handle norm, py::handle rope, bool skips_zeros, uintptr_t stream) {
  RowsArguments r(x, dy, frame_start, role, norm, rope, stream);
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
  RowsArguments r(x, dy, 0, role, norm, rope, stream);
  const RopeTableBackward args{{r.args, {}, skips_zeros, nullptr}, frames, tokens, heads, tensor_of(partial).shape[0],
                               r.call.floats(partial, 4)};
  py::gil_scoped_release unlocked;
  rope_table_backward(r.call.where(), r.dtype, args);
}

}  // namespace

void define_qk_norm_rope(py::module_& m) {
  using namespace py::literals;
  m.def("rows_norm_rope", rows_forward, "x"_a, "y"_a, "frame_start"_a, "role"_a, "norm"_a, "rope"_a, "stream"_a);
  m.def("rows_backward_blocks", rows_backward_blocks, "rows"_a);
  m.def("rows_norm_rope_backward", rows_backward, "x"_a, "dy"_a, "dx"_a, "sums"_a, "frame_start"_a, "role"_a, "norm"_a,
        "rope"_a, "skips_zeros"_a, "stream"_a);
  m.def("rope_table_backward", table_backward, "x"_a, "dy"_a, "partial"_a, "frames"_a, "tokens"_a, "heads"_a, "role"_a,
        "norm"_a, "rope"_a, "skips_zeros"_a, "stream"_a);
}

}  // namespace vdcore::cuda
