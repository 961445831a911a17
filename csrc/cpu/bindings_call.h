// Arguments of the CPU kernels, out of Python: what is checked here is what would corrupt memory.
#pragma once

#include "bindings_common.h"
#include "cpu/engine.h"

namespace vdcore::cpu {

inline TensorView strided_cpu_view(py::handle capsule, int rank) {
  if (!capsule.is_none() && tensor_of(capsule).device.type != 1) throw py::value_error("a CPU tensor was expected");
  return strided_view(capsule, rank);
}

inline TensorView cpu_view(py::handle capsule, int rank) {
  const TensorView v = strided_cpu_view(capsule, rank);
  if (v && v.size[rank - 1] > 1 && v.stride[rank - 1] != 1) throw py::value_error("the innermost stride must be 1");
  return v;
}

// A tensor that is broadcast where its size is 1.
inline TensorView broadcast_view(py::handle capsule, int rank) {
  TensorView v = cpu_view(capsule, rank);
  for (int axis = 0; axis < rank; ++axis)
    if (v && v.size[axis] == 1) v.stride[axis] = 0;
  return v;
}

inline float* floats(py::handle capsule) {
  if (capsule.is_none()) return nullptr;
  const dlpack::Tensor& t = tensor_of(capsule);
  if (t.dtype.code != 2 || t.dtype.bits != 32 || t.device.type != 1)
    throw py::type_error("a float32 CPU tensor was expected");
  return reinterpret_cast<float*>(static_cast<char*>(t.data) + t.byte_offset);
}

// (kind, over_all, eps, q_weight, k_weight, q_bias, k_bias) or None.
inline Norm norm_of(py::handle given) {
  Norm norm;
  if (given.is_none()) return norm;
  const auto t = py::reinterpret_borrow<py::tuple>(given);
  norm.kind = static_cast<NormKind>(t[0].cast<int>());
  norm.over_all = t[1].cast<bool>();
  norm.eps = t[2].cast<float>();
  norm.q_weight = floats(t[3]);
  norm.k_weight = floats(t[4]);
  norm.q_bias = floats(t[5]);
  norm.k_bias = floats(t[6]);
  return norm;
}

// (style, cos, sin) or None.
inline Rope rope_of(py::handle given) {
  Rope rope;
  if (given.is_none()) return rope;
  const auto t = py::reinterpret_borrow<py::tuple>(given);
  rope.style = static_cast<RopeStyle>(t[0].cast<int>());
  rope.cos = broadcast_view(t[1], 4);
  rope.sin = broadcast_view(t[2], 4);
  return rope;
}

// weight_sums: of q's weight, k's weight, q's bias, k's bias; missing ones are None.
inline void set_norm_rope_gradients(NormRopeGradients& args, int64_t items, const std::vector<py::object>& weight_sums,
                                    py::handle dcos, py::handle dsin, int64_t table_item_stride) {
  args.items = items;
  args.dq_weight = floats(weight_sums[0]);
  args.dk_weight = floats(weight_sums[1]);
  args.dq_bias = floats(weight_sums[2]);
  args.dk_bias = floats(weight_sums[3]);
  args.dcos = broadcast_view(dcos, 4);
  args.dsin = broadcast_view(dsin, 4);
  args.table_item_stride = table_item_stride;
}

// Waking a thread costs tens of microseconds: worth it from about this much arithmetic on.
inline int worthwhile_threads(int threads, double multiply_adds) {
  const double most = multiply_adds / 1e6;
  return most < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

inline double elements(const TensorView& x) {
  double n = 1;
  for (int axis = 0; axis < x.ndim; ++axis) n *= static_cast<double>(x.size[axis]);
  return n;
}

}  // namespace vdcore::cpu
