// Frame attention, and the groups of tokens that see one another, on the CPU, in Python.
#include "cpu/core/bindings.h"

#include <array>
#include <cstdlib>
#include <memory>

#include "common/token_groups.h"
#include "common/visible_frames.h"
#include "cpu/core/bindings_call.h"
#include "cpu/core/bindings_named.h"

namespace vdcore::cpu {
namespace {

// q, k, v, out, lse, spatial; backward: then dout, dlse, dq, dk, dv. lse, spatial and dlse may be None. The video has
// the groups' key frames, and the text their tokens, as a video of one frame.
FrameSegment segment_of(const TokenGroups& groups, const std::vector<py::object>& tensors, bool text, bool backward) {
  require(tensors.size() == (backward ? 11 : 6), "a segment has 6 tensors, and 11 in backward");
  FrameSegment s;
  s.q = query_view(tensors[0]);
  s.k = key_view(tensors[1], s.q);
  s.v = like("v", tensors[2], s.k);
  require(s.q.size[0] == groups.batch, "the groups are of another batch");
  require(s.q.size[1] * s.q.size[2] == (text ? groups.text : groups.query_tokens), "the groups are of other queries");
  require(s.k.size[1] * s.k.size[2] == (text ? groups.text : groups.key_tokens), "the groups are of other keys");
  require(!text || (s.q.size[1] == 1 && s.k.size[1] == 1), "text is a video of one frame");
  const Sizes rows = {s.q.size[0], s.q.size[1], s.q.size[2], s.q.size[3]};
  s.out = like("out", tensors[3], s.q);
  s.lse = row_view("lse", tensors[4], rows);
  s.spatial = optional_like("spatial", tensors[5], s.q);
  if (!backward) return s;
  require(static_cast<bool>(s.lse), "backward needs lse");
  s.dout = like("dout", tensors[6], s.q);
  s.dlse = row_view("dlse", tensors[7], rows);
  s.dq = like("dq", tensors[8], s.q);
  s.dk = like("dk", tensors[9], s.k);
  s.dv = like("dv", tensors[10], s.k);
  return s;
}

FrameAttention frame_call(const TokenGroups& groups, const std::vector<py::object>& video,
                          const std::vector<py::object>& text, float scale, int threads, bool backward) {
  FrameAttention args;
  const TensorView& q = (args.segment[0] = segment_of(groups, video, false, backward)).q;
  if (groups.text) {
    const FrameSegment& s = args.segment[1] = segment_of(groups, text, true, backward);
    require(s.q.size[3] == q.size[3] && s.k.size[3] == args.segment[0].k.size[3] && s.q.size[4] == q.size[4],
            "text must have the heads of the video");
  }
  args.groups = &groups;
  args.scale = scale;
  double pairs = 0;
  for (const TokenGroup& group : groups.queries)
    for (int i = 0; i < group.count; ++i) pairs += static_cast<double>(group.tokens.size()) * group.runs[i].size();
  args.threads = worthwhile_threads(threads, 2 * pairs * static_cast<double>(q.size[3] * q.size[4]));
  return args;
}

void frame_attention_forward(const TokenGroups& groups, const std::vector<py::object>& video,
                             const std::vector<py::object>& text, float scale, py::handle gate, int threads) {
  FrameAttention args = frame_call(groups, video, text, scale, threads, false);
  const int64_t* q = args.segment[0].q.size;
  args.gate = broadcast_view("gate", gate, {q[0], q[1], q[2], q[3], q[4]});
  require(!args.gate || !groups.text, "a gate knows of no text");
  py::gil_scoped_release unlocked;
  kernels().frame_attention_forward(args);
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

void frame_attention_backward(const TokenGroups& groups, const std::vector<py::object>& video,
                              const std::vector<py::object>& text, float scale, int threads) {
  FrameAttention args = frame_call(groups, video, text, scale, threads, true);
  const TensorView &q = args.segment[0].q, &k = args.segment[0].k;
  const BackwardPlan plan(groups, q.size[3], k.size[3], q.size[4], args.threads);
  const int64_t rows = q.size[0] * q.size[3] * (groups.query_tokens + groups.text);
  const size_t bytes = static_cast<size_t>(plan.floats() + (rows + 15) / 16 * 16) * sizeof(float);
  const std::unique_ptr<float, Free> memory(static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
  if (!memory) throw std::bad_alloc();
  std::vector<int64_t> counts(plan.together ? static_cast<size_t>(plan.tiles + plan.chains) : 0);
  args.plan = &plan;
  args.workspace = memory.get();
  args.delta = args.workspace + plan.floats();
  args.progress = counts.data();
  args.done = counts.data() + (plan.together ? plan.tiles : 0);
  py::gil_scoped_release unlocked;
  kernels().frame_attention_backward(args);
}

TokenGroups frame_groups_of(const std::vector<int64_t>& mask, int64_t batch, int64_t queries, int64_t keys,
                            int64_t tokens, int64_t start, const Lengths& lengths, int64_t text,
                            const Lengths& text_lengths, bool text_sees_video) {
  require(batch >= 0 && queries >= 0 && keys >= 0 && tokens >= 0 && start >= 0 && text >= 0, "sizes are at least 0");
  check_lengths(lengths, batch);
  check_lengths(text_lengths, batch);
  return frame_groups(checked_mask(mask), batch, queries, keys, tokens, start, data_of(lengths),
                      {text, data_of(text_lengths), text_sees_video});
}

TokenGroups prompt_groups_of(int64_t batch, int64_t frames, int64_t tokens, int64_t prompt, bool per_frame,
                             const Lengths& lengths) {
  require(batch >= 0 && frames >= 0 && tokens >= 0 && prompt >= 0, "sizes are at least 0");
  check_lengths(lengths, per_frame ? batch * frames : batch);
  return prompt_groups(batch, frames, tokens, prompt, per_frame, data_of(lengths));
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

// What backward takes in memory, and for tests how it is shared out.
py::dict backward_plan(const TokenGroups& groups, int64_t heads, int64_t kv_heads, int64_t channels, int threads) {
  require(heads > 0 && kv_heads > 0 && channels > 0 && threads > 0, "sizes are at least 1");
  const BackwardPlan plan(groups, heads, kv_heads, channels, threads);
  py::dict found;
  found["chains"] = plan.chains;
  found["parts"] = plan.parts;
  found["tiles"] = plan.tiles;
  found["together"] = plan.together;
  found["items"] = plan.items();
  found["buffers"] = plan.buffers;
  found["bytes"] = plan.floats() * static_cast<int64_t>(sizeof(float));
  return found;
}

// For tests: the engine's view of a mask, two runs per query and two per key.
py::tuple frame_runs(const std::vector<int64_t>& mask, int64_t queries, int64_t keys, int64_t start) {
  using Runs = std::array<std::array<int64_t, 2>, 2>;
  const VisibleTables t(checked_mask(mask), queries, keys, start, nullptr, 1);
  std::vector<Runs> rows, columns;
  for (int64_t i = 0; i < queries; ++i)
    rows.push_back(t.dense ? Runs{{{0, 0}, {0, keys}}}
                           : Runs{{{t.low_begin[i], t.low_end[i]}, {t.begin[i], t.end[i]}}});
  for (int64_t i = 0; i < keys; ++i)
    columns.push_back(t.dense ? Runs{{{0, queries}, {0, 0}}}
                              : Runs{{{t.seen_begin[i], t.seen_end[i]}, {t.also_begin[i], t.also_end[i]}}});
  return py::make_tuple(rows, columns);
}

}  // namespace

void define_frame_attention(py::module_& m) {
  using namespace py::literals;
  m.def("frame_runs", frame_runs);
  py::class_<TokenGroups>(m, "TokenGroups")
      .def_property_readonly("queries", [](const TokenGroups& g) { return group_list(g.queries); })
      .def_property_readonly("keys", [](const TokenGroups& g) { return group_list(g.keys); })
      .def_property_readonly("components", [](const TokenGroups& g) { return g.components.size(); })
      .def_property_readonly("largest_component", &TokenGroups::largest_component)
      .def("backward_plan", backward_plan, "heads"_a, "kv_heads"_a, "channels"_a, "threads"_a);
  m.def("frame_groups", frame_groups_of, "mask"_a, "batch"_a, "queries"_a, "keys"_a, "tokens"_a, "q_start"_a,
        "lengths"_a, "text"_a, "text_lengths"_a, "text_sees_video"_a);
  m.def("prompt_groups", prompt_groups_of, "batch"_a, "frames"_a, "tokens"_a, "prompt"_a, "per_frame"_a, "lengths"_a);
  define_named(m, "frame_attention_forward", frame_attention_forward, "groups", "video", "text", "scale", "gate",
               "threads");
  define_named(m, "frame_attention_backward", frame_attention_backward, "groups", "video", "text", "scale", "threads");
}

}  // namespace vdcore::cpu
