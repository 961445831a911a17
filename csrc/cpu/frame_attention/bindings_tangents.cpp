// Tangents of frame attention on the CPU, in Python.
#include "cpu/core/bindings.h"
#include "cpu/core/bindings_call.h"
#include "cpu/core/bindings_named.h"

namespace vdcore::cpu {
namespace {

// q, k, v, out, lse, dout, dlse, dq, dk, dv; the last three may be None.
TangentSegment tangent_segment(const TokenGroups& groups, const std::vector<py::object>& tensors, bool text) {
  require(tensors.size() == 10, "a segment has 10 tensors");
  TangentSegment s;
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
  s.dout = like("dout", tensors[5], s.q);
  s.dlse = row_view("dlse", tensors[6], rows);
  s.dq = optional_like("dq", tensors[7], s.q);
  s.dk = optional_like("dk", tensors[8], s.k);
  s.dv = optional_like("dv", tensors[9], s.k);
  require(s.lse && s.dlse, "lse and dlse must be given");
  return s;
}

void frame_attention_tangents(const TokenGroups& groups, const std::vector<py::object>& video,
                              const std::vector<py::object>& text, float scale, int threads) {
  FrameTangents args;
  const TangentSegment& first = args.segment[0] = tangent_segment(groups, video, false);
  if (groups.text) {
    const TangentSegment& s = args.segment[1] = tangent_segment(groups, text, true);
    require(s.q.size[3] == first.q.size[3] && s.k.size[3] == first.k.size[3] && s.q.size[4] == first.q.size[4],
            "text must have the heads of the video");
    for (const auto& [a, b] : {std::pair(&s.dq, &first.dq), std::pair(&s.dk, &first.dk), std::pair(&s.dv, &first.dv)})
      require(static_cast<bool>(*a) == static_cast<bool>(*b), "video and text have the same tangents");
  }
  args.groups = &groups;
  args.scale = scale;
  double pairs = 0;
  for (const TokenGroup& group : groups.queries)
    for (int i = 0; i < group.count; ++i) pairs += static_cast<double>(group.tokens.size()) * group.runs[i].size();
  args.threads = worthwhile_threads(threads, 3 * pairs * static_cast<double>(first.q.size[3] * first.q.size[4]));
  py::gil_scoped_release unlocked;
  kernels().frame_attention_tangents(args);
}

}  // namespace

void define_frame_tangents(py::module_& m) {
  define_named(m, "frame_attention_tangents", frame_attention_tangents, "groups", "video", "text", "scale", "threads");
}

}  // namespace vdcore::cpu
