// Norm and rope, adaptive layer norm and patches on the CPU, in Python.
#include <array>

#include "cpu/core/bindings.h"
#include "cpu/core/bindings_call.h"

namespace vdcore::cpu {
namespace {

// ---- Norm and rope -----------------------------------------------------------------------------------------------

NormRopeSizes sizes_of(const QKNormRope& a) {
  return {a.frame_start + a.q.size[1], a.q.size[2], a.q.size[3], a.k.size[3], a.q.size[4]};
}

QKNormRope qk_norm_rope_call(py::handle q, py::handle k, int64_t frame_start, py::handle norm, py::handle rope,
                             int threads) {
  QKNormRope args;
  args.q = query_view(q);
  const int64_t* n = args.q.size;
  args.k = cpu_view(k, 5);
  args.k = sized_view("k", k, {n[0], n[1], n[2], args.k.size[3], n[4]});
  require(args.k.dtype == args.q.dtype, "k must have the dtype of q");
  require(frame_start >= 0, "frame_start must be at least 0");
  args.frame_start = frame_start;
  args.norm = norm_of(norm, sizes_of(args));
  args.rope = rope_of(rope, sizes_of(args));
  args.threads = worthwhile_threads(threads, 8. * elements(args.q));
  return args;
}

// The kernel reads and writes all of a side in one dtype.
TensorView side_view(const char* name, py::handle capsule, const TensorView& x) {
  const TensorView v = like(name, capsule, x);
  if (v.dtype != x.dtype) throw py::type_error(std::string(name) + " must have the dtype of q and k");
  return v;
}

void qk_norm_rope_forward(py::handle q, py::handle k, py::handle q_out, py::handle k_out, int64_t frame_start,
                          py::handle norm, py::handle rope, int threads) {
  QKNormRope args = qk_norm_rope_call(q, k, frame_start, norm, rope, threads);
  args.q_out = side_view("q_out", q_out, args.q);
  args.k_out = side_view("k_out", k_out, args.k);
  py::gil_scoped_release unlocked;
  kernels().qk_norm_rope_forward(args);
}

void qk_norm_rope_backward(py::handle q, py::handle k, py::handle dq_out, py::handle dk_out, py::handle dq,
                           py::handle dk, int64_t frame_start, py::handle norm, py::handle rope, int threads,
                           int64_t items, const std::vector<py::object>& weight_sums, py::handle dcos,
                           py::handle dsin) {
  QKNormRopeBackward args;
  const QKNormRope& f = args.forward = qk_norm_rope_call(q, k, frame_start, norm, rope, threads);
  if (!dq_out.is_none()) {
    args.dq_out = side_view("dq_out", dq_out, f.q);
    args.dq = side_view("dq", dq, f.q);
  }
  if (!dk_out.is_none()) {
    args.dk_out = side_view("dk_out", dk_out, f.k);
    args.dk = side_view("dk", dk, f.k);
  }
  set_norm_rope_gradients(args, f.norm, f.rope, sizes_of(f), items, weight_sums, dcos, dsin);
  py::gil_scoped_release unlocked;
  kernels().qk_norm_rope_backward(args);
}

// ---- Adaptive layer norm -----------------------------------------------------------------------------------------

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

// ---- Patches -----------------------------------------------------------------------------------------------------

using Patch = std::array<int64_t, 3>;

struct PatchSizes {
  int64_t K, E;  // numbers of a patch, channels of a token
};

// Sets video and tokens of a call, and returns what its weights are measured by.
PatchSizes set_patches(Patches& patches, TensorView& tokens, py::handle video, const Patch& patch, bool channels_last,
                       py::handle given_tokens) {
  const TensorView& v = patches.video = strided_cpu_view(video, 5);
  for (int axis = 0; axis < 3; ++axis) {
    require(patch[axis] > 0 && v.size[2 + axis] > 0 && v.size[2 + axis] % patch[axis] == 0,
            "the video must consist of whole patches");
    patches.patch[axis] = patch[axis];
    patches.grid[axis] = v.size[2 + axis] / patch[axis];
  }
  patches.channels_last = channels_last;
  const int64_t E = cpu_view(given_tokens, 4).size[3];
  tokens = sized_view("tokens", given_tokens, {v.size[0], patches.grid[0], patches.grid[1] * patches.grid[2], E});
  require(v.size[0] > 0 && v.size[1] > 0 && E > 0, "video and tokens must not be empty");
  require(tokens.dtype == v.dtype, "tokens must have the dtype of the video");
  return {v.size[1] * patch[0] * patch[1] * patch[2], E};
}

// weight: float32 (K, E), any strides.
void patch_product(bool to_tokens, py::handle video, const Patch& patch, bool channels_last, py::handle tokens,
                   py::handle weight, py::handle bias, py::handle packed, int threads) {
  PatchProduct args;
  const auto [K, E] = set_patches(args.patches, args.tokens, video, patch, channels_last, tokens);
  const TensorView w = strided_cpu_view(weight, 2);
  require(w && w.dtype == DType::f32 && w.size[0] == K && w.size[1] == E, "weight must be float32 (K, E)");
  args.weight = {reinterpret_cast<const float*>(w.data), w.stride[0], w.stride[1]};
  args.bias = floats("bias", bias, {to_tokens ? E : K});
  args.packed = floats("packed", packed, {(E + 64) * (K + 64)});
  require(args.packed, "packed must be given");
  args.threads = worthwhile_threads(threads, 4. * elements(args.tokens));
  py::gil_scoped_release unlocked;
  if (to_tokens)
    kernels().tokens_from_patches(args);
  else
    kernels().patches_from_tokens(args);
}

void patch_weight_gradient(py::handle video, const Patch& patch, bool channels_last, py::handle tokens, int64_t parts,
                           py::handle dweight, py::handle sum_tokens, py::handle sum_patches, int threads) {
  PatchWeightGradient args;
  const auto [K, E] = set_patches(args.patches, args.tokens, video, patch, channels_last, tokens);
  require(parts > 0, "there must be a part");
  args.parts = parts;
  args.dweight = floats("dweight", dweight, {parts, K, E});
  require(args.dweight, "dweight must be given");
  args.sum_tokens = floats("sum_tokens", sum_tokens, {parts, E});
  args.sum_patches = floats("sum_patches", sum_patches, {parts, K});
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
