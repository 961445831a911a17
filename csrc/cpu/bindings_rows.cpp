// Norm and rope, adaptive layer norm and patches on the CPU, in Python.
#include <array>

#include "cpu/bindings.h"
#include "cpu/bindings_call.h"

namespace vdcore::cpu {
namespace {

// ---- Norm and rope -----------------------------------------------------------------------------------------------

QKNormRope qk_norm_rope_call(py::handle q, py::handle k, int64_t frame_start, py::handle norm, py::handle rope,
                             int threads) {
  QKNormRope args;
  args.q = cpu_view(q, 5);
  args.k = cpu_view(k, 5);
  args.frame_start = frame_start;
  args.norm = norm_of(norm);
  args.rope = rope_of(rope);
  args.threads = worthwhile_threads(threads, 8. * elements(args.q));
  return args;
}

void qk_norm_rope_forward(py::handle q, py::handle k, py::handle q_out, py::handle k_out, int64_t frame_start,
                          py::handle norm, py::handle rope, int threads) {
  QKNormRope args = qk_norm_rope_call(q, k, frame_start, norm, rope, threads);
  args.q_out = cpu_view(q_out, 5);
  args.k_out = cpu_view(k_out, 5);
  py::gil_scoped_release unlocked;
  kernels().qk_norm_rope_forward(args);
}

void qk_norm_rope_backward(py::handle q, py::handle k, py::handle dq_out, py::handle dk_out, py::handle dq,
                           py::handle dk, int64_t frame_start, py::handle norm, py::handle rope, int threads,
                           int64_t items, const std::vector<py::object>& weight_sums, py::handle dcos, py::handle dsin,
                           int64_t table_item_stride) {
  QKNormRopeBackward args;
  args.forward = qk_norm_rope_call(q, k, frame_start, norm, rope, threads);
  args.dq_out = cpu_view(dq_out, 5);
  args.dk_out = cpu_view(dk_out, 5);
  args.dq = cpu_view(dq, 5);
  args.dk = cpu_view(dk, 5);
  set_norm_rope_gradients(args, items, weight_sums, dcos, dsin, table_item_stride);
  py::gil_scoped_release unlocked;
  kernels().qk_norm_rope_backward(args);
}

// ---- Adaptive layer norm -----------------------------------------------------------------------------------------

Modulate modulate_call(py::handle x, py::handle shift, py::handle scale, py::handle weight, py::handle bias, int kind,
                       float eps, int threads) {
  Modulate args;
  args.x = cpu_view(x, 4);
  args.shift = broadcast_view(shift, 4);
  args.scale = broadcast_view(scale, 4);
  args.weight = floats(weight);
  args.bias = floats(bias);
  args.kind = static_cast<NormKind>(kind);
  args.eps = eps;
  args.threads = worthwhile_threads(threads, 4. * elements(args.x));
  return args;
}

void modulate_forward(py::handle x, py::handle shift, py::handle scale, py::handle weight, py::handle bias, int kind,
                      float eps, int threads, py::handle y) {
  Modulate args = modulate_call(x, shift, scale, weight, bias, kind, eps, threads);
  args.y = cpu_view(y, 4);
  py::gil_scoped_release unlocked;
  kernels().modulate_forward(args);
}

void modulate_backward(py::handle x, py::handle shift, py::handle scale, py::handle weight, py::handle bias, int kind,
                       float eps, int threads, py::handle dy, py::handle dx, py::handle dscale, bool scale_per_token,
                       bool per_frame, int64_t parts, py::handle sum_dy, py::handle sum_dz, py::handle sum_dz_x) {
  ModulateBackward args;
  args.forward = modulate_call(x, shift, scale, weight, bias, kind, eps, threads);
  args.dy = cpu_view(dy, 4);
  args.dx = cpu_view(dx, 4);
  args.dscale = cpu_view(dscale, 4);
  args.scale_per_token = scale_per_token;
  args.sums = {per_frame, parts};
  args.sum_dy = floats(sum_dy);
  args.sum_dz = floats(sum_dz);
  args.sum_dz_x = floats(sum_dz_x);
  py::gil_scoped_release unlocked;
  kernels().modulate_backward(args);
}

void gate_residual_forward(py::handle residual, py::handle x, py::handle gate, py::handle y, int threads) {
  GateResidual args;
  args.residual = cpu_view(residual, 4);
  args.x = cpu_view(x, 4);
  args.gate = broadcast_view(gate, 4);
  args.y = cpu_view(y, 4);
  args.threads = worthwhile_threads(threads, 4. * elements(args.x));
  py::gil_scoped_release unlocked;
  kernels().gate_residual_forward(args);
}

void gate_residual_backward(py::handle x, py::handle gate, py::handle dy, py::handle dx, py::handle dgate,
                            bool per_frame, int64_t parts, py::handle sum_dy_x, int threads) {
  GateResidualBackward args;
  args.x = cpu_view(x, 4);
  args.gate = broadcast_view(gate, 4);
  args.dy = cpu_view(dy, 4);
  args.dx = cpu_view(dx, 4);
  args.dgate = cpu_view(dgate, 4);
  args.sums = {per_frame, parts};
  args.sum_dy_x = floats(sum_dy_x);
  args.threads = worthwhile_threads(threads, 4. * elements(args.x));
  py::gil_scoped_release unlocked;
  kernels().gate_residual_backward(args);
}

// ---- Patches -----------------------------------------------------------------------------------------------------

using Sizes = std::array<int64_t, 3>;

Patches patches_of(py::handle video, const Sizes& patch, bool channels_last) {
  Patches patches;
  patches.video = strided_cpu_view(video, 5);
  for (int axis = 0; axis < 3; ++axis) {
    patches.patch[axis] = patch[axis];
    patches.grid[axis] = patches.video.size[2 + axis] / patch[axis];
  }
  patches.channels_last = channels_last;
  return patches;
}

void patch_product(bool to_tokens, py::handle video, const Sizes& patch, bool channels_last, py::handle tokens,
                   py::handle weight, int64_t k_stride, int64_t e_stride, py::handle bias, py::handle packed,
                   int threads) {
  PatchProduct args;
  args.patches = patches_of(video, patch, channels_last);
  args.tokens = cpu_view(tokens, 4);
  args.weight = {floats(weight), k_stride, e_stride};
  args.bias = floats(bias);
  args.packed = floats(packed);
  args.threads = worthwhile_threads(threads, 4. * elements(args.tokens));
  py::gil_scoped_release unlocked;
  if (to_tokens)
    kernels().tokens_from_patches(args);
  else
    kernels().patches_from_tokens(args);
}

void patch_weight_gradient(py::handle video, const Sizes& patch, bool channels_last, py::handle tokens, int64_t parts,
                           py::handle dweight, py::handle sum_tokens, py::handle sum_patches, int threads) {
  PatchWeightGradient args;
  args.patches = patches_of(video, patch, channels_last);
  args.tokens = cpu_view(tokens, 4);
  args.parts = parts;
  args.dweight = floats(dweight);
  args.sum_tokens = floats(sum_tokens);
  args.sum_patches = floats(sum_patches);
  args.threads = worthwhile_threads(threads, 4. * elements(args.tokens));
  py::gil_scoped_release unlocked;
  kernels().patch_weight_gradient(args);
}

}  // namespace

void define_rows(py::module_& m) {
  m.def("qk_norm_rope_forward", qk_norm_rope_forward);
  m.def("qk_norm_rope_backward", qk_norm_rope_backward);
  m.def("modulate_forward", modulate_forward);
  m.def("modulate_backward", modulate_backward);
  m.def("gate_residual_forward", gate_residual_forward);
  m.def("gate_residual_backward", gate_residual_backward);
  m.def("patch_product", patch_product);
  m.def("patch_weight_gradient", patch_weight_gradient);
}

}  // namespace vdcore::cpu
