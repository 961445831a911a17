// The tensors of one call as the kernels take them. What is checked here is what would corrupt memory.
#pragma once

#include "bindings_common.h"
#include "cuda/core/arguments.h"
#include "cuda/core/launch.h"
#ifdef VDCORE_EMULATE
#include "emulator/emulator.h"
#endif

namespace vdcore::cuda {

#ifdef VDCORE_EMULATE
constexpr int kDeviceType = 1;  // CPU
struct Exposed {
  ~Exposed() { emulator::expose_nothing(); }
};
inline void expose(const TensorView& v) {
  int64_t last = 0;
  for (int axis = 0; axis < v.ndim; ++axis) last += (v.size[axis] - 1) * v.stride[axis];
  if (v) emulator::expose(v.data, v.data + (last + 1) * size_of(v.dtype));
}
#else
constexpr int kDeviceType = 2;  // CUDA
struct Exposed {
  Exposed() {}
};
inline void expose(const TensorView&) {}
#endif

// The tensors of one call, which must all be on one device.
class Call {
 public:
  Call(const char* op, uintptr_t stream) {
    where_.op = op, where_.stream = reinterpret_cast<void*>(stream);
    if (recording()) recording()->tensors.clear();
  }

  TensorView view(py::handle capsule, int rank) {
    const TensorView v = strided_view(capsule, rank);
    if (v) on_device(tensor_of(capsule));
    expose(v);
    note(v);
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

  // Expanded to (B, T, S, H, D); float32, or the element of the call.
  Gate gate(py::handle capsule) {
    const TensorView v = view(capsule, 5);
    return {v.data, v.dtype == DType::f32, v.stride[0], v.stride[1], v.stride[2], v.stride[3], v.stride[4]};
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
  static void note(const TensorView& v) {
    if (!v || !recording()) return;
    int64_t bytes = size_of(v.dtype);
    for (int axis = 0; axis < v.ndim; ++axis)
      if (v.stride[axis] != 0) bytes *= v.size[axis];
    recording()->tensors[v.data] = bytes;
  }

  void on_device(const dlpack::Tensor& t) {
    if (t.device.type != (recording() ? 1 : kDeviceType) || (known_ && t.device.id != where_.device))
      throw py::value_error("tensors of one device were expected, where this module's kernels run");
    where_.device = t.device.id;
    known_ = true;
  }

  Where where_{};
  bool known_ = false;
  Exposed exposed_;
};

}  // namespace vdcore::cuda
