// Gated attention in Python.
#include "cuda/core/bindings.h"

#include "cuda/core/bindings_call.h"
#include "cuda/gated_attention/gated_attention.h"

namespace vdcore::cuda {
namespace {

// `gate`: expanded to q's shape.
void gated_forward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle kept, py::handle lse,
                   py::handle gate, py::handle lengths, float scale, uintptr_t stream) {
  Call call("gated_attention", stream);
  const dlpack::Tensor& shape = tensor_of(q);
  SpatialGated args{};
  args.q = call.tokens(q), args.k = call.tokens(k), args.v = call.tokens(v);
  args.out = call.tokens(out), args.kept = call.tokens(kept);
  args.lse = call.floats(lse, 4);
  args.gate = call.gate(gate);
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

}  // namespace

void define_gated_attention(py::module_& m) {
  using namespace py::literals;
  m.def("spatial_gated_forward", gated_forward, "q"_a, "k"_a, "v"_a, "out"_a, "kept"_a, "lse"_a, "gate"_a, "lengths"_a,
        "scale"_a, "stream"_a);
}

}  // namespace vdcore::cuda
