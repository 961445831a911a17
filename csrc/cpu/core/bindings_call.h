// Arguments of the CPU kernels, out of Python: what is checked here is what would corrupt memory. Kernels take every
// index from the sizes of a call's first tensor, so all others are held against these.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <tuple>

#include "bindings_common.h"
#include "cpu/core/engine.h"

namespace vdcore::cpu {

using Sizes = std::initializer_list<int64_t>;

[[noreturn]] inline void wrong_sizes(const char* name, Sizes expected, const int64_t* sizes, int rank) {
  const auto list = [](const int64_t* from, int64_t count) {
    std::string text = "(";
    for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(from[i]);
    return text + ")";
  };
  throw py::value_error(std::string(name) + " must be " +
                        list(expected.begin(), static_cast<int64_t>(expected.size())) + ", got " + list(sizes, rank));
}

inline void require(bool holds, const char* what) {
  if (!holds) throw py::value_error(what);
}

inline const dlpack::Tensor& cpu_tensor(py::handle capsule) {
  const dlpack::Tensor& t = tensor_of(capsule);
  if (t.device.type != 1) throw py::value_error("a CPU tensor was expected");
  if (t.dtype.lanes != 1) throw py::type_error("a tensor of plain numbers was expected");
  return t;
}

// Any strides. An empty view for None.
inline TensorView strided_cpu_view(py::handle capsule, int rank) {
  if (!capsule.is_none()) cpu_tensor(capsule);
  return strided_view(capsule, rank);
}

inline TensorView cpu_view(py::handle capsule, int rank) {
  const TensorView v = strided_cpu_view(capsule, rank);
  if (v && v.size[rank - 1] > 1 && v.stride[rank - 1] != 1) throw py::value_error("the innermost stride must be 1");
  return v;
}

// A tensor of these sizes.
inline TensorView sized_view(const char* name, py::handle capsule, Sizes sizes) {
  const TensorView v = cpu_view(capsule, static_cast<int>(sizes.size()));
  require(static_cast<bool>(v), "a tensor is missing");
  if (!std::equal(sizes.begin(), sizes.end(), v.size)) wrong_sizes(name, sizes, v.size, v.ndim);
  return v;
}
inline TensorView optional_view(const char* name, py::handle capsule, Sizes sizes) {
  return capsule.is_none() ? TensorView() : sized_view(name, capsule, sizes);
}

// A number for every row, which kernels read and write as float32.
inline TensorView row_view(const char* name, py::handle capsule, Sizes sizes) {
  const TensorView v = optional_view(name, capsule, sizes);
  if (v && v.dtype != DType::f32) throw py::type_error(std::string(name) + " must be float32");
  return v;
}

// A tensor that is broadcast, by a stride of 0, where its size is 1.
inline TensorView broadcast_view(const char* name, py::handle capsule, Sizes sizes) {
  TensorView v = cpu_view(capsule, static_cast<int>(sizes.size()));
  for (int axis = 0; axis < v.ndim; ++axis) {
    if (v.size[axis] != 1 && v.size[axis] != sizes.begin()[axis]) wrong_sizes(name, sizes, v.size, v.ndim);
    if (v.size[axis] == 1) v.stride[axis] = 0;
  }
  return v;
}

// Contiguous float32 memory of these sizes; null for None.
inline float* floats(const char* name, py::handle capsule, Sizes sizes) {
  if (capsule.is_none()) return nullptr;
  const dlpack::Tensor& t = cpu_tensor(capsule);
  if (t.dtype.code != 2 || t.dtype.bits != 32) throw py::type_error(std::string(name) + " must be float32");
  const auto rank = static_cast<int>(sizes.size());
  if (t.ndim != rank || !std::equal(sizes.begin(), sizes.end(), t.shape)) wrong_sizes(name, sizes, t.shape, t.ndim);
  int64_t dense = 1;
  for (int axis = rank - 1; axis >= 0 && t.strides; dense *= larger(t.shape[axis--], 1))
    if (t.shape[axis] > 1 && t.strides[axis] != dense) throw py::value_error(std::string(name) + " must be contiguous");
  return reinterpret_cast<float*>(static_cast<char*>(t.data) + t.byte_offset);
}

// ---- Queries, keys and values ------------------------------------------------------------------------------------

// q (B, T, S, H, D) sets the sizes of a call.
inline const TensorView& checked_queries(const TensorView& q) {
  for (int axis = 0; axis < 5; ++axis) require(q.size[axis] > 0, "q must be given and not be empty");
  return q;
}
inline TensorView query_view(py::handle q) { return checked_queries(cpu_view(q, 5)); }

// k of a call with these queries: (B, any frames, any tokens, G, D), with G a divisor of H.
inline TensorView key_view(py::handle k, const TensorView& q) {
  const TensorView v = cpu_view(k, 5);
  const Sizes sizes = {q.size[0], v.size[1], v.size[2], v.size[3], q.size[4]};
  require(v && v.size[1] > 0 && v.size[2] > 0 && v.size[3] > 0, "k must be given and not be empty");
  if (!std::equal(sizes.begin(), sizes.end(), v.size)) wrong_sizes("k", sizes, v.size, 5);
  require(q.size[3] % v.size[3] == 0, "the heads of k must divide those of q");
  require(v.dtype == q.dtype, "k must have the dtype of q");
  return v;
}

struct QKVViews {
  TensorView q, k, v;
};

// Parts of a packed tensor (B, T, S, 3, H, D).
inline QKVViews parts_of(const TensorView& packed) {
  require(packed.size[3] == 3, "a packed tensor is (B, T, S, 3, H, D)");
  TensorView parts[3];
  for (int i = 0; i < 3; ++i) {
    TensorView& x = parts[i] = packed;
    x.data += i * packed.stride[3] * size_of(packed.dtype);
    x.ndim = 5;
    for (int axis = 3; axis < 5; ++axis) x.size[axis] = packed.size[axis + 1], x.stride[axis] = packed.stride[axis + 1];
  }
  return {parts[0], parts[1], parts[2]};
}

inline TensorView like(const char* name, py::handle capsule, const TensorView& x) {
  return sized_view(name, capsule, {x.size[0], x.size[1], x.size[2], x.size[3], x.size[4]});
}
inline TensorView optional_like(const char* name, py::handle capsule, const TensorView& x) {
  return capsule.is_none() ? TensorView() : like(name, capsule, x);
}

using Lengths = std::optional<std::vector<int64_t>>;
inline const int64_t* data_of(const Lengths& lengths) { return lengths ? lengths->data() : nullptr; }

inline FrameMask checked_mask(const std::vector<int64_t>& numbers) {
  require(numbers.size() >= 5 && numbers[2] > 0,
          "a mask is (past, future, chunk, sink, clean, *shots), its chunk at least 1");
  return mask_of(numbers);
}

inline void check_lengths(const Lengths& lengths, int64_t count) {
  require(!lengths || static_cast<int64_t>(lengths->size()) == count, "lengths must have one entry per sample");
}

// What norm and rope of a call depend on.
struct NormRopeSizes {
  int64_t frames;  // rows that the table of a rope is read at
  int64_t S, H, G, D;
};

// (kind, over_all, eps, q_weight, k_weight, q_bias, k_bias) or None.
inline Norm norm_of(py::handle given, const NormRopeSizes& n) {
  Norm norm;
  if (given.is_none()) return norm;
  const auto t = py::cast<py::tuple>(given);
  require(t.size() == 7, "a norm is (kind, over_all, eps, q_weight, k_weight, q_bias, k_bias)");
  norm.kind = static_cast<NormKind>(t[0].cast<int>());
  require(norm.kind == NormKind::rms || norm.kind == NormKind::layer, "the kind of a norm must be 1 or 2");
  norm.over_all = t[1].cast<bool>();
  norm.eps = t[2].cast<float>();
  const int64_t q = (norm.over_all ? n.H : 1) * n.D, k = (norm.over_all ? n.G : 1) * n.D;
  norm.q_weight = floats("q_weight", t[3], {q});
  norm.k_weight = floats("k_weight", t[4], {k});
  norm.q_bias = floats("q_bias", t[5], {q});
  norm.k_bias = floats("k_bias", t[6], {k});
  return norm;
}

// (style, cos, sin) or None.
inline Rope rope_of(py::handle given, const NormRopeSizes& n) {
  Rope rope;
  if (given.is_none()) return rope;
  const auto t = py::cast<py::tuple>(given);
  require(t.size() == 3, "a rope is (style, cos, sin)");
  rope.style = static_cast<RopeStyle>(t[0].cast<int>());
  require(rope.style == RopeStyle::interleaved || rope.style == RopeStyle::half, "the style of a rope must be 1 or 2");
  const TensorView cos = cpu_view(t[1], 4);
  const Sizes sizes = {larger(cos.size[0], n.frames), n.S, n.H, cos.size[3]};
  rope.cos = broadcast_view("cos", t[1], sizes);
  require(rope.cos && cos.size[3] > 0 && 2 * cos.size[3] <= n.D, "cos must have 1 to D / 2 pairs");
  require(cos.size[2] == 1 || n.G == n.H, "a table per head needs as many heads of k as of q");
  rope.sin = sized_view("sin", t[2], {cos.size[0], cos.size[1], cos.size[2], cos.size[3]});
  rope.sin = broadcast_view("sin", t[2], sizes);
  require(rope.sin.dtype == rope.cos.dtype, "sin must have the dtype of cos");
  return rope;
}

// weight_sums: (items, channels) of q's weight, k's weight, q's bias, k's bias; missing ones are None. dcos, dsin: as
// the table, one for each item, or one for all where its rows belong to positions.
inline void set_norm_rope_gradients(NormRopeGradients& args, const Norm& norm, const Rope& rope, const NormRopeSizes& n,
                                    int64_t items, const std::vector<py::object>& weight_sums, py::handle dcos,
                                    py::handle dsin) {
  require(items > 0, "there must be an item of work");
  require(weight_sums.size() == 4, "weight_sums has four entries");
  const int64_t q = (norm.over_all ? n.H : 1) * n.D, k = (norm.over_all ? n.G : 1) * n.D;
  args.items = items;
  args.dq_weight = floats("dq_weight", weight_sums[0], {items, q});
  args.dk_weight = floats("dk_weight", weight_sums[1], {items, k});
  args.dq_bias = floats("dq_bias", weight_sums[2], {items, q});
  args.dk_bias = floats("dk_bias", weight_sums[3], {items, k});
  require(dcos.is_none() == dsin.is_none(), "dcos and dsin belong together");
  if (dcos.is_none()) return;
  const int64_t* table = rope.cos.size;
  const Sizes sizes = {table[1] > 1 ? 1 : items, table[0], table[1], table[2], table[3]};
  for (const auto& [name, capsule, view] :
       {std::tuple("dcos", dcos, &args.dcos), std::tuple("dsin", dsin, &args.dsin)}) {
    const TensorView all = row_view(name, capsule, sizes);
    *view = all;
    view->ndim = 4;
    for (int axis = 0; axis < 4; ++axis) {
      view->size[axis] = all.size[axis + 1];
      view->stride[axis] = all.size[axis + 1] == 1 ? 0 : all.stride[axis + 1];
    }
    require(view == &args.dcos || all.stride[0] == args.table_item_stride, "dcos and dsin must lie alike");
    args.table_item_stride = all.stride[0];
  }
}

// Waking a thread costs tens of microseconds: worth it from about this much arithmetic on.
inline int worthwhile_threads(int threads, double multiply_adds) {
  const double most = multiply_adds / 1e6;
  return most < 1 || threads < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

inline double elements(const TensorView& x) {
  double n = 1;
  for (int axis = 0; axis < x.ndim; ++axis) n *= static_cast<double>(x.size[axis]);
  return n;
}

}  // namespace vdcore::cpu
