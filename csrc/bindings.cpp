// The Python module vdcore._native: tensors come as DLPack capsules and go to the engines as TensorView. Arguments have
// been checked in Python; what is checked here is what would corrupt memory.
#include "cuda/bindings.h"

#include <array>

#include "bindings_common.h"
#include "common/threads.h"
#include "common/token_groups.h"
#include "common/visible_frames.h"
#include "cpu/engine.h"

using namespace pybind11::literals;
using namespace vdcore;

namespace {

TensorView strided_cpu_view(py::handle capsule, int rank) {
  if (!capsule.is_none() && tensor_of(capsule).device.type != 1) throw py::value_error("a CPU tensor was expected");
  return strided_view(capsule, rank);
}

TensorView cpu_view(py::handle capsule, int rank) {
  const TensorView v = strided_cpu_view(capsule, rank);
  if (v && v.size[rank - 1] > 1 && v.stride[rank - 1] != 1) throw py::value_error("the innermost stride must be 1");
  return v;
}

// A tensor that is broadcast where its size is 1.
TensorView broadcast_view(py::handle capsule, int rank) {
  TensorView v = cpu_view(capsule, rank);
  for (int axis = 0; axis < rank; ++axis)
    if (v && v.size[axis] == 1) v.stride[axis] = 0;
  return v;
}

float* floats(py::handle capsule) {
  if (capsule.is_none()) return nullptr;
  const dlpack::Tensor& t = tensor_of(capsule);
  if (t.dtype.code != 2 || t.dtype.bits != 32 || t.device.type != 1)
    throw py::type_error("a float32 CPU tensor was expected");
  return reinterpret_cast<float*>(static_cast<char*>(t.data) + t.byte_offset);
}

// (kind, over_all, eps, q_weight, k_weight, q_bias, k_bias) or None.
cpu::Norm norm_of(py::handle given) {
  cpu::Norm norm;
  if (given.is_none()) return norm;
  const auto t = py::reinterpret_borrow<py::tuple>(given);
  norm.kind = static_cast<cpu::NormKind>(t[0].cast<int>());
  norm.over_all = t[1].cast<bool>();
  norm.eps = t[2].cast<float>();
  norm.q_weight = floats(t[3]);
  norm.k_weight = floats(t[4]);
  norm.q_bias = floats(t[5]);
  norm.k_bias = floats(t[6]);
  return norm;
}

// (style, cos, sin) or None.
cpu::Rope rope_of(py::handle given) {
  cpu::Rope rope;
  if (given.is_none()) return rope;
  const auto t = py::reinterpret_borrow<py::tuple>(given);
  rope.style = static_cast<cpu::RopeStyle>(t[0].cast<int>());
  rope.cos = broadcast_view(t[1], 4);
  rope.sin = broadcast_view(t[2], 4);
  return rope;
}

// Waking a thread costs tens of microseconds: worth it from about this much arithmetic on.
int worthwhile_threads(int threads, double multiply_adds) {
  const double most = multiply_adds / 1e6;
  return most < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

double elements(const TensorView& x) {
  double n = 1;
  for (int axis = 0; axis < x.ndim; ++axis) n *= static_cast<double>(x.size[axis]);
  return n;
}

struct TemporalCall {
  cpu::TemporalAttention args;
  VisibleTables tables;

  TemporalCall(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
               std::optional<std::vector<int64_t>> lengths, const std::vector<int64_t>& mask, int64_t q_start,
               float scale, py::handle norm, py::handle rope, int threads, int64_t queries, int64_t keys, int64_t batch)
      : tables(mask_of(mask), queries, keys, q_start, lengths ? lengths->data() : nullptr, batch) {
    args.q = cpu_view(q, 5);
    args.k = cpu_view(k, 5);
    args.v = cpu_view(v, 5);
    args.out = cpu_view(out, 5);
    args.lse = cpu_view(lse, 4);
    args.q_start = q_start;
    args.scale = scale;
    args.norm = norm_of(norm);
    args.rope = rope_of(rope);
    args.visible = {tables.begin.data(),    tables.end.data(), tables.sink.data(), tables.seen_begin.data(),
                    tables.seen_end.data(), tables.per_sample, tables.dense};
    const TensorView& x = args.q;
    args.threads =
        worthwhile_threads(threads, 2. * x.size[0] * x.size[1] * x.size[2] * x.size[3] * x.size[4] * args.k.size[1]);
  }
};

void temporal_attention_forward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                                std::optional<std::vector<int64_t>> lengths, const std::vector<int64_t>& mask,
                                int64_t q_start, float scale, py::handle norm, py::handle rope, int threads) {
  const dlpack::Tensor &tq = tensor_of(q), &tk = tensor_of(k);
  const TemporalCall call(q, k, v, out, lse, lengths, mask, q_start, scale, norm, rope, threads, tq.shape[1],
                          tk.shape[1], tq.shape[0]);
  py::gil_scoped_release unlocked;
  cpu::kernels().temporal_attention_forward(call.args);
}

void temporal_attention_backward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                                 std::optional<std::vector<int64_t>> lengths, const std::vector<int64_t>& mask,
                                 int64_t q_start, float scale, py::handle norm, py::handle rope, int threads,
                                 py::handle dout, py::handle dlse, py::handle dq, py::handle dk, py::handle dv,
                                 int64_t items, const std::vector<py::object>& weight_sums, py::handle dcos,
                                 py::handle dsin, int64_t table_item_stride) {
  const dlpack::Tensor &tq = tensor_of(q), &tk = tensor_of(k);
  const TemporalCall call(q, k, v, out, lse, lengths, mask, q_start, scale, norm, rope, threads, tq.shape[1],
                          tk.shape[1], tq.shape[0]);
  cpu::TemporalAttentionBackward args;
  args.forward = call.args;
  args.dout = cpu_view(dout, 5);
  args.dlse = cpu_view(dlse, 4);
  args.dq = cpu_view(dq, 5);
  args.dk = cpu_view(dk, 5);
  args.dv = cpu_view(dv, 5);
  args.items = items;
  args.dq_weight = floats(weight_sums[0]);
  args.dk_weight = floats(weight_sums[1]);
  args.dq_bias = floats(weight_sums[2]);
  args.dk_bias = floats(weight_sums[3]);
  args.dcos = broadcast_view(dcos, 4);
  args.dsin = broadcast_view(dsin, 4);
  args.table_item_stride = table_item_stride;
  py::gil_scoped_release unlocked;
  cpu::kernels().temporal_attention_backward(args);
}

using Lengths = std::optional<std::vector<int64_t>>;
const int64_t* data_of(const Lengths& lengths) { return lengths ? lengths->data() : nullptr; }

// q, k, v, out, lse, spatial; backward: then dout, dlse, dq, dk, dv. Missing ones are None.
cpu::FrameSegment segment_of(const std::vector<py::object>& tensors) {
  cpu::FrameSegment s;
  TensorView* const views[] = {&s.q, &s.k, &s.v, &s.out, &s.lse, &s.spatial, &s.dout, &s.dlse, &s.dq, &s.dk, &s.dv};
  for (size_t i = 0; i < tensors.size(); ++i) {
    const bool per_row = views[i] == &s.lse || views[i] == &s.dlse;
    *views[i] = cpu_view(tensors[i], per_row ? 4 : 5);
  }
  return s;
}

cpu::FrameAttention frame_call(const TokenGroups& groups, const std::vector<py::object>& video,
                               const std::vector<py::object>& text, float scale, int threads) {
  cpu::FrameAttention args;
  args.segment[0] = segment_of(video);
  args.segment[1] = segment_of(text);
  args.groups = &groups;
  args.scale = scale;
  double pairs = 0;
  for (const TokenGroup& group : groups.queries)
    for (int i = 0; i < group.count; ++i) pairs += static_cast<double>(group.tokens.size()) * group.runs[i].size();
  args.threads = worthwhile_threads(threads, 2 * pairs * args.segment[0].q.size[3] * args.segment[0].q.size[4]);
  return args;
}

void frame_attention_forward(const TokenGroups& groups, const std::vector<py::object>& video,
                             const std::vector<py::object>& text, float scale, py::handle gate, int threads) {
  cpu::FrameAttention args = frame_call(groups, video, text, scale, threads);
  args.gate = broadcast_view(gate, 5);
  py::gil_scoped_release unlocked;
  cpu::kernels().frame_attention_forward(args);
}

// `delta`: float32 (B, H, rows). `workspace`: float32 (workers, floats of one component's queries), or, with `parts` >
// 1, one row for every component, key/value head and part; None for two passes.
void frame_attention_backward(const TokenGroups& groups, const std::vector<py::object>& video,
                              const std::vector<py::object>& text, float scale, py::handle delta, py::handle workspace,
                              int64_t parts, int threads) {
  cpu::FrameAttention args = frame_call(groups, video, text, scale, threads);
  args.delta = floats(delta);
  args.parts = parts;
  args.workspace = floats(workspace);
  if (args.workspace) {
    args.workers = tensor_of(workspace).shape[0];
    args.workspace_floats = tensor_of(workspace).shape[1];
  }
  py::gil_scoped_release unlocked;
  cpu::kernels().frame_attention_backward(args);
}

// For tests: [(sample, tokens, runs)], runs as (text, begin, end).
py::list group_list(const std::vector<TokenGroup>& groups) {
  const auto run = [](const TokenRun& r) { return py::make_tuple(r.text, r.begin, r.end); };
  py::list found;
  for (const TokenGroup& group : groups) {
    py::list runs;
    for (int i = 0; i < group.count; ++i) runs.append(run(group.runs[i]));
    found.append(py::make_tuple(group.sample, run(group.tokens), runs));
  }
  return found;
}

// ---- Norm and rope -----------------------------------------------------------------------------------------------

cpu::QKNormRope qk_norm_rope_call(py::handle q, py::handle k, int64_t frame_start, py::handle norm, py::handle rope,
                                  int threads) {
  cpu::QKNormRope args;
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
  cpu::QKNormRope args = qk_norm_rope_call(q, k, frame_start, norm, rope, threads);
  args.q_out = cpu_view(q_out, 5);
  args.k_out = cpu_view(k_out, 5);
  py::gil_scoped_release unlocked;
  cpu::kernels().qk_norm_rope_forward(args);
}

void qk_norm_rope_backward(py::handle q, py::handle k, py::handle dq_out, py::handle dk_out, py::handle dq,
                           py::handle dk, int64_t frame_start, py::handle norm, py::handle rope, int threads,
                           int64_t items, const std::vector<py::object>& weight_sums, py::handle dcos, py::handle dsin,
                           int64_t table_item_stride) {
  cpu::QKNormRopeBackward args;
  args.forward = qk_norm_rope_call(q, k, frame_start, norm, rope, threads);
  args.dq_out = cpu_view(dq_out, 5);
  args.dk_out = cpu_view(dk_out, 5);
  args.dq = cpu_view(dq, 5);
  args.dk = cpu_view(dk, 5);
  args.items = items;
  args.dq_weight = floats(weight_sums[0]);
  args.dk_weight = floats(weight_sums[1]);
  args.dq_bias = floats(weight_sums[2]);
  args.dk_bias = floats(weight_sums[3]);
  args.dcos = broadcast_view(dcos, 4);
  args.dsin = broadcast_view(dsin, 4);
  args.table_item_stride = table_item_stride;
  py::gil_scoped_release unlocked;
  cpu::kernels().qk_norm_rope_backward(args);
}

// ---- Adaptive layer norm -----------------------------------------------------------------------------------------

cpu::Modulate modulate_call(py::handle x, py::handle shift, py::handle scale, py::handle weight, py::handle bias,
                            int kind, float eps, int threads) {
  cpu::Modulate args;
  args.x = cpu_view(x, 4);
  args.shift = broadcast_view(shift, 4);
  args.scale = broadcast_view(scale, 4);
  args.weight = floats(weight);
  args.bias = floats(bias);
  args.kind = static_cast<cpu::NormKind>(kind);
  args.eps = eps;
  args.threads = worthwhile_threads(threads, 4. * elements(args.x));
  return args;
}

void modulate_forward(py::handle x, py::handle shift, py::handle scale, py::handle weight, py::handle bias, int kind,
                      float eps, int threads, py::handle y) {
  cpu::Modulate args = modulate_call(x, shift, scale, weight, bias, kind, eps, threads);
  args.y = cpu_view(y, 4);
  py::gil_scoped_release unlocked;
  cpu::kernels().modulate_forward(args);
}

void modulate_backward(py::handle x, py::handle shift, py::handle scale, py::handle weight, py::handle bias, int kind,
                       float eps, int threads, py::handle dy, py::handle dx, py::handle dscale, bool scale_per_token,
                       bool per_frame, int64_t parts, py::handle sum_dy, py::handle sum_dz, py::handle sum_dz_x) {
  cpu::ModulateBackward args;
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
  cpu::kernels().modulate_backward(args);
}

void gate_residual_forward(py::handle residual, py::handle x, py::handle gate, py::handle y, int threads) {
  cpu::GateResidual args;
  args.residual = cpu_view(residual, 4);
  args.x = cpu_view(x, 4);
  args.gate = broadcast_view(gate, 4);
  args.y = cpu_view(y, 4);
  args.threads = worthwhile_threads(threads, 4. * elements(args.x));
  py::gil_scoped_release unlocked;
  cpu::kernels().gate_residual_forward(args);
}

void gate_residual_backward(py::handle x, py::handle gate, py::handle dy, py::handle dx, py::handle dgate,
                            bool per_frame, int64_t parts, py::handle sum_dy_x, int threads) {
  cpu::GateResidualBackward args;
  args.x = cpu_view(x, 4);
  args.gate = broadcast_view(gate, 4);
  args.dy = cpu_view(dy, 4);
  args.dx = cpu_view(dx, 4);
  args.dgate = cpu_view(dgate, 4);
  args.sums = {per_frame, parts};
  args.sum_dy_x = floats(sum_dy_x);
  args.threads = worthwhile_threads(threads, 4. * elements(args.x));
  py::gil_scoped_release unlocked;
  cpu::kernels().gate_residual_backward(args);
}

// ---- Patches -----------------------------------------------------------------------------------------------------

using Sizes = std::array<int64_t, 3>;

cpu::Patches patches_of(py::handle video, const Sizes& patch, bool channels_last) {
  cpu::Patches patches;
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
  cpu::PatchProduct args;
  args.patches = patches_of(video, patch, channels_last);
  args.tokens = cpu_view(tokens, 4);
  args.weight = {floats(weight), k_stride, e_stride};
  args.bias = floats(bias);
  args.packed = floats(packed);
  args.threads = worthwhile_threads(threads, 4. * elements(args.tokens));
  py::gil_scoped_release unlocked;
  if (to_tokens)
    cpu::kernels().tokens_from_patches(args);
  else
    cpu::kernels().patches_from_tokens(args);
}

void patch_weight_gradient(py::handle video, const Sizes& patch, bool channels_last, py::handle tokens, int64_t parts,
                           py::handle dweight, py::handle sum_tokens, py::handle sum_patches, int threads) {
  cpu::PatchWeightGradient args;
  args.patches = patches_of(video, patch, channels_last);
  args.tokens = cpu_view(tokens, 4);
  args.parts = parts;
  args.dweight = floats(dweight);
  args.sum_tokens = floats(sum_tokens);
  args.sum_patches = floats(sum_patches);
  args.threads = worthwhile_threads(threads, 4. * elements(args.tokens));
  py::gil_scoped_release unlocked;
  cpu::kernels().patch_weight_gradient(args);
}

// For tests: the engine's view of a mask, [(sink_end, begin, end)] per query and [(begin, end)] per key.
py::tuple frame_runs(const std::vector<int64_t>& mask, int64_t queries, int64_t keys, int64_t start) {
  const VisibleTables t(mask_of(mask), queries, keys, start, nullptr, 1);
  std::vector<std::array<int64_t, 3>> rows;
  std::vector<std::array<int64_t, 2>> columns;
  for (int64_t i = 0; i < queries; ++i)
    rows.push_back(t.dense ? std::array<int64_t, 3>{0, 0, keys}
                           : std::array<int64_t, 3>{t.sink[i], t.begin[i], t.end[i]});
  for (int64_t i = 0; i < keys; ++i)
    columns.push_back(t.dense ? std::array<int64_t, 2>{0, queries}
                              : std::array<int64_t, 2>{t.seen_begin[i], t.seen_end[i]});
  return py::make_tuple(rows, columns);
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "vdcore's compiled kernels. Use the functions of vdcore instead: they check their arguments.";
  m.def("cpu_isa", [] { return cpu::kernels().isa; });
  cuda::define(m);
  m.def("share_openmp", [](const std::string& path) { return share_openmp(path.c_str()); });
  m.def("frame_runs", frame_runs);
  py::class_<TokenGroups>(m, "TokenGroups")
      .def_property_readonly("queries", [](const TokenGroups& g) { return group_list(g.queries); })
      .def_property_readonly("keys", [](const TokenGroups& g) { return group_list(g.keys); })
      .def_property_readonly("components", [](const TokenGroups& g) { return g.components.size(); })
      .def_property_readonly("largest_component", &TokenGroups::largest_component);
  m.def("frame_groups",
        [](const std::vector<int64_t>& mask, int64_t batch, int64_t queries, int64_t keys, int64_t tokens,
           int64_t start, const Lengths& lengths, int64_t text, const Lengths& text_lengths, bool text_sees_video) {
          return frame_groups(mask_of(mask), batch, queries, keys, tokens, start, data_of(lengths),
                              {text, data_of(text_lengths), text_sees_video});
        });
  m.def("prompt_groups",
        [](int64_t batch, int64_t frames, int64_t tokens, int64_t prompt, bool per_frame, const Lengths& lengths) {
          return prompt_groups(batch, frames, tokens, prompt, per_frame, data_of(lengths));
        });
  m.def("frame_attention_forward", frame_attention_forward);
  m.def("frame_attention_backward", frame_attention_backward);
  m.def("temporal_attention_forward", temporal_attention_forward);
  m.def("temporal_attention_backward", temporal_attention_backward);
  m.def("qk_norm_rope_forward", qk_norm_rope_forward);
  m.def("qk_norm_rope_backward", qk_norm_rope_backward);
  m.def("modulate_forward", modulate_forward);
  m.def("modulate_backward", modulate_backward);
  m.def("gate_residual_forward", gate_residual_forward);
  m.def("gate_residual_backward", gate_residual_backward);
  m.def("patch_product", patch_product);
  m.def("patch_weight_gradient", patch_weight_gradient);
}
