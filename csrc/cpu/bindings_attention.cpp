// Temporal and frame attention on the CPU, in Python.
#include <array>

#include "common/token_groups.h"
#include "common/visible_frames.h"
#include "cpu/bindings.h"
#include "cpu/bindings_call.h"

namespace vdcore::cpu {
namespace {

using Lengths = std::optional<std::vector<int64_t>>;
const int64_t* data_of(const Lengths& lengths) { return lengths ? lengths->data() : nullptr; }

struct TemporalCall {
  TemporalAttention args;
  VisibleTables tables;

  TemporalCall(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse, const Lengths& lengths,
               const std::vector<int64_t>& mask, int64_t q_start, float scale, py::handle norm, py::handle rope,
               int threads)
      : tables(mask_of(mask), tensor_of(q).shape[1], tensor_of(k).shape[1], q_start, data_of(lengths),
               tensor_of(q).shape[0]) {
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
    args.threads = worthwhile_threads(threads, 2. * elements(args.q) * args.k.size[1]);
  }
};

void temporal_attention_forward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                                const Lengths& lengths, const std::vector<int64_t>& mask, int64_t q_start, float scale,
                                py::handle norm, py::handle rope, int threads) {
  const TemporalCall call(q, k, v, out, lse, lengths, mask, q_start, scale, norm, rope, threads);
  py::gil_scoped_release unlocked;
  kernels().temporal_attention_forward(call.args);
}

void temporal_attention_backward(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                                 const Lengths& lengths, const std::vector<int64_t>& mask, int64_t q_start, float scale,
                                 py::handle norm, py::handle rope, int threads, py::handle dout, py::handle dlse,
                                 py::handle dq, py::handle dk, py::handle dv, int64_t items,
                                 const std::vector<py::object>& weight_sums, py::handle dcos, py::handle dsin,
                                 int64_t table_item_stride) {
  const TemporalCall call(q, k, v, out, lse, lengths, mask, q_start, scale, norm, rope, threads);
  TemporalAttentionBackward args;
  args.forward = call.args;
  args.dout = cpu_view(dout, 5);
  args.dlse = cpu_view(dlse, 4);
  args.dq = cpu_view(dq, 5);
  args.dk = cpu_view(dk, 5);
  args.dv = cpu_view(dv, 5);
  set_norm_rope_gradients(args, items, weight_sums, dcos, dsin, table_item_stride);
  py::gil_scoped_release unlocked;
  kernels().temporal_attention_backward(args);
}

// q, k, v, out, lse, spatial; backward: then dout, dlse, dq, dk, dv. Missing ones are None.
FrameSegment segment_of(const std::vector<py::object>& tensors) {
  FrameSegment s;
  TensorView* const views[] = {&s.q, &s.k, &s.v, &s.out, &s.lse, &s.spatial, &s.dout, &s.dlse, &s.dq, &s.dk, &s.dv};
  for (size_t i = 0; i < tensors.size(); ++i) {
    const bool per_row = views[i] == &s.lse || views[i] == &s.dlse;
    *views[i] = cpu_view(tensors[i], per_row ? 4 : 5);
  }
  return s;
}

FrameAttention frame_call(const TokenGroups& groups, const std::vector<py::object>& video,
                          const std::vector<py::object>& text, float scale, int threads) {
  FrameAttention args;
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
  FrameAttention args = frame_call(groups, video, text, scale, threads);
  args.gate = broadcast_view(gate, 5);
  py::gil_scoped_release unlocked;
  kernels().frame_attention_forward(args);
}

// `delta`: float32 (B, H, rows). `workspace`: float32 (workers, floats of one component's queries), or, with `parts` >
// 1, one row for every component, key/value head and part; None for two passes.
void frame_attention_backward(const TokenGroups& groups, const std::vector<py::object>& video,
                              const std::vector<py::object>& text, float scale, py::handle delta, py::handle workspace,
                              int64_t parts, int threads) {
  FrameAttention args = frame_call(groups, video, text, scale, threads);
  args.delta = floats(delta);
  args.parts = parts;
  args.workspace = floats(workspace);
  if (args.workspace) {
    args.workers = tensor_of(workspace).shape[0];
    args.workspace_floats = tensor_of(workspace).shape[1];
  }
  py::gil_scoped_release unlocked;
  kernels().frame_attention_backward(args);
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

void define_attention(py::module_& m) {
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
}

}  // namespace vdcore::cpu
