// The CUDA kernels in Python: what is checked here is what would corrupt memory. Also the module of the emulator, which
// takes CPU tensors where the other one takes CUDA's.
#include "cuda/bindings.h"

#include "bindings_common.h"
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

#ifdef VDCORE_EMULATE
constexpr int kDeviceType = 1;  // CPU
struct Exposed {
  ~Exposed() { emulator::expose_nothing(); }
};
void expose(const TensorView& v) {
  int64_t last = 0;
  for (int axis = 0; axis < v.ndim; ++axis) last += (v.size[axis] - 1) * v.stride[axis];
  if (v) emulator::expose(v.data, v.data + (last + 1) * size_of(v.dtype));
}
#else
constexpr int kDeviceType = 2;  // CUDA
struct Exposed {
  Exposed() {}
};
void expose(const TensorView&) {}
#endif

// The tensors of one call, which must all be on one device.
class Call {
 public:
  Call(const char* op, uintptr_t stream) { where_.op = op, where_.stream = reinterpret_cast<void*>(stream); }

  TensorView view(py::handle capsule, int rank) {
    const TensorView v = strided_view(capsule, rank);
    if (v) on_device(tensor_of(capsule));
    expose(v);
    return v;
  }

  // (B, T, S, heads, D) in q's dtype, rows at multiples of 16 bytes.
  Tokens tokens(py::handle capsule) {
    const TensorView v = view(capsule, 5);
    if (!v) return {};
    bool aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.stride[4] == 1;
    for (int axis = 0; axis < 4; ++axis) aligned &= v.size[axis] == 1 || v.stride[axis] % 8 == 0;
    if (!aligned || v.dtype == DType::f32) throw py::value_error("rows of 16-bit elements at multiples of 16 bytes");
    return {v.data, 2 * v.stride[0], 2 * v.stride[1], 2 * v.stride[2], 2 * v.stride[3]};
  }

  float* floats(py::handle capsule, int rank) {
    const TensorView v = view(capsule, rank);
    if (v && v.dtype != DType::f32) throw py::type_error("float32 was expected");
    return reinterpret_cast<float*>(v.data);
  }

  // int64, one dimension.
  const int64_t* integers(py::handle capsule) {
    if (capsule.is_none()) return nullptr;
    const dlpack::Tensor& t = tensor_of(capsule);
    on_device(t);
    if (t.dtype.code != 0 || t.dtype.bits != 64 || t.ndim != 1 || (t.strides && t.shape[0] > 1 && t.strides[0] != 1))
      throw py::type_error("int64 with one dimension was expected");
    auto* data = reinterpret_cast<const int64_t*>(static_cast<char*>(t.data) + t.byte_offset);
#ifdef VDCORE_EMULATE
    emulator::expose(data, data + t.shape[0]);
#endif
    return data;
  }

  // (kind, eps, q_weight, k_weight, q_bias, k_bias) or None; (style, cos, sin) or None.
  NormRope norm_rope(py::handle norm, py::handle rope) {
    NormRope how;
    if (!norm.is_none()) {
      const auto t = py::reinterpret_borrow<py::tuple>(norm);
      how.kind = static_cast<NormKind>(t[0].cast<int>());
      how.eps = t[1].cast<float>();
      how.q = {floats(t[2], 1), floats(t[4], 1)};
      how.k = {floats(t[3], 1), floats(t[5], 1)};
    }
    if (!rope.is_none()) {
      const auto t = py::reinterpret_borrow<py::tuple>(rope);
      how.style = static_cast<RopeStyle>(t[0].cast<int>());
      const TensorView cos = view(t[1], 4), sin = view(t[2], 4);
      if (cos.dtype != DType::f32 || sin.dtype != DType::f32) throw py::type_error("float32 was expected");
      how.cos = reinterpret_cast<const float*>(cos.data);
      how.sin = reinterpret_cast<const float*>(sin.data);
      how.pairs = static_cast<int32_t>(cos.size[3]);
      const auto stride = [&](int axis) { return cos.size[axis] == 1 ? 0 : cos.stride[axis]; };
      how.table_t = stride(0), how.table_s = stride(1), how.table_h = stride(2);
    }
    return how;
  }

  const Where& where() const { return where_; }

 private:
  void on_device(const dlpack::Tensor& t) {
    if (t.device.type != kDeviceType || (known_ && t.device.id != where_.device))
      throw py::value_error("tensors of one device were expected, where this module's kernels run");
    where_.device = t.device.id;
    known_ = true;
  }

  Where where_{};
  bool known_ = false;
  Exposed exposed_;
};

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
