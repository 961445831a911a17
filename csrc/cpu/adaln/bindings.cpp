// Adaptive layer norm on the CPU, in Python.
#include "cpu/core/bindings.h"

#include "cpu/core/bindings_call.h"
#include "cpu/core/bindings_named.h"

namespace vdcore::cpu {
namespace {

// x (B, T, S, C) sets the sizes of a call.
TensorView token_view(py::handle x) {
  const TensorView v = cpu_view(x, 4);
  for (int64_t size : {v.size[0], v.size[1], v.size[2], v.size[3]})
    require(size > 0, "x must be given and not be empty");
  return v;
}

TensorView tokens_like(const char* name, py::handle capsule, const TensorView& x) {
  const TensorView v = sized_view(name, capsule, {x.size[0], x.size[1], x.size[2], x.size[3]});
  if (v.dtype != x.dtype) throw py::type_error(std::string(name) + " must have the dtype of x");
  return v;
}
TensorView optional_tokens_like(const char* name, py::handle capsule, const TensorView& x) {
  return capsule.is_none() ? TensorView() : tokens_like(name, capsule, x);
}

// A row per sample, frame or token: (B, 1, 1, C), (B, T, 1, C) or (B, T, S, C), in a dtype of its own.
TensorView shared_rows(const char* name, py::handle capsule, const TensorView& x) {
  const TensorView v = broadcast_view(name, capsule, {x.size[0], x.size[1], x.size[2], x.size[3]});
  require(v && v.size[0] == x.size[0] && v.size[3] == x.size[3], "a shared row is missing, or has other sizes");
  return v;
}

// The gradient of such rows where they are per token.
TensorView gradient_per_token(const char* name, py::handle capsule, const TensorView& x) {
  return optional_view(name, capsule, {x.size[0], x.size[1], x.size[2], x.size[3]});
}

GroupSums group_sums(bool per_frame, int64_t parts) {
  require(parts > 0, "there must be a part");
  return {per_frame, parts};
}
float* sums_of_groups(const char* name, py::handle capsule, const TensorView& x, const GroupSums& sums) {
  return floats(name, capsule, {x.size[0], sums.per_frame ? x.size[1] : 1, sums.parts, x.size[3]});
}

Modulate modulate_call(py::handle x, py::handle shift, py::handle scale, py::handle weight, py::handle bias, int kind,
                       float eps, int threads) {
  Modulate args;
  args.x = token_view(x);
  args.shift = shared_rows("shift", shift, args.x);
  args.scale = shared_rows("scale", scale, args.x);
  args.weight = floats("weight", weight, {args.x.size[3]});
  args.bias = floats("bias", bias, {args.x.size[3]});
  args.kind = static_cast<NormKind>(kind);
  args.eps = eps;
  args.threads = worthwhile_threads(threads, 4. * elements(args.x));
  return args;
}

void modulate_forward(py::handle x, py::handle shift, py::handle scale, py::handle weight, py::handle bias, int kind,
                      float eps, int threads, py::handle y) {
  Modulate args = modulate_call(x, shift, scale, weight, bias, kind, eps, threads);
  args.y = tokens_like("y", y, args.x);
  py::gil_scoped_release unlocked;
  kernels().modulate_forward(args);
}

void modulate_backward(py::handle x, py::handle shift, py::handle scale, py::handle weight, py::handle bias, int kind,
                       float eps, int threads, py::handle dy, py::handle dx, py::handle dscale, bool scale_per_token,
                       bool per_frame, int64_t parts, py::handle sum_dy, py::handle sum_dz, py::handle sum_dz_x) {
  ModulateBackward args;
  const TensorView& like = (args.forward = modulate_call(x, shift, scale, weight, bias, kind, eps, threads)).x;
  args.dy = tokens_like("dy", dy, like);
  args.dx = optional_tokens_like("dx", dx, like);
  args.dscale = gradient_per_token("dscale", dscale, like);
  args.scale_per_token = scale_per_token;
  args.sums = group_sums(per_frame, parts);
  args.sum_dy = sums_of_groups("sum_dy", sum_dy, like, args.sums);
  args.sum_dz = sums_of_groups("sum_dz", sum_dz, like, args.sums);
  args.sum_dz_x = sums_of_groups("sum_dz_x", sum_dz_x, like, args.sums);
  py::gil_scoped_release unlocked;
  kernels().modulate_backward(args);
}

void gate_residual_forward(py::handle residual, py::handle x, py::handle gate, py::handle y, int threads) {
  GateResidual args;
  args.x = token_view(x);
  args.residual = tokens_like("residual", residual, args.x);
  args.gate = shared_rows("gate", gate, args.x);
  args.y = tokens_like("y", y, args.x);
  args.threads = worthwhile_threads(threads, 4. * elements(args.x));
  py::gil_scoped_release unlocked;
  kernels().gate_residual_forward(args);
}

void gate_residual_backward(py::handle x, py::handle gate, py::handle dy, py::handle dx, py::handle dgate,
                            bool per_frame, int64_t parts, py::handle sum_dy_x, int threads) {
  GateResidualBackward args;
  args.x = token_view(x);
  args.gate = shared_rows("gate", gate, args.x);
  args.dy = tokens_like("dy", dy, args.x);
  args.dx = optional_tokens_like("dx", dx, args.x);
  args.dgate = gradient_per_token("dgate", dgate, args.x);
  args.sums = group_sums(per_frame, parts);
  args.sum_dy_x = sums_of_groups("sum_dy_x", sum_dy_x, args.x, args.sums);
  args.threads = worthwhile_threads(threads, 4. * elements(args.x));
  py::gil_scoped_release unlocked;
  kernels().gate_residual_backward(args);
}

}  // namespace

void define_adaln(py::module_& m) {
  define_named(m, "modulate_forward", modulate_forward, "x", "shift", "scale", "weight", "bias", "kind", "eps",
               "threads", "y");
  define_named(m, "modulate_backward", modulate_backward, "x", "shift", "scale", "weight", "bias", "kind", "eps",
               "threads", "dy", "dx", "dscale", "scale_per_token", "per_frame", "parts", "sum_dy", "sum_dz",
               "sum_dz_x");
  define_named(m, "gate_residual_forward", gate_residual_forward, "residual", "x", "gate", "y", "threads");
  define_named(m, "gate_residual_backward", gate_residual_backward, "x", "gate", "dy", "dx", "dgate", "per_frame",
               "parts", "sum_dy_x", "threads");
}

}  // namespace vdcore::cpu
