// Frame attention in Python.
#include "cuda/core/bindings.h"

#include "cuda/core/bindings_call.h"
#include "cuda/frame_attention/frame_attention.h"

namespace vdcore::cuda {
namespace {

// q, k, v or nothing.
FrameTokens tokens_of(Call& call, const std::vector<py::object>& qkv) {
  FrameTokens tokens;
  TensorView* const views[] = {&tokens.q, &tokens.k, &tokens.v};
  for (size_t i = 0; i < qkv.size(); ++i) {
    *views[i] = call.view(qkv[i], 5);
    if (views[i]->stride[4] != 1 && views[i]->size[4] != 1) throw py::value_error("the innermost stride must be 1");
  }
  return tokens;
}

// `gate`: None, or broadcast to (B, T, S, H, D) with strides of 0; `ungated`: None, or as out.
void frame_forward(const std::string& op, const std::vector<py::object>& video, const std::vector<py::object>& text,
                   py::handle out, py::handle lse, py::handle lengths, py::handle text_lengths, int64_t video_row,
                   int64_t text_row, const std::vector<int64_t>& mask, int64_t q_start, bool text_sees_video,
                   float exponent, py::handle gate, py::handle ungated, uintptr_t stream) {
  Call call(op.c_str(), stream);
  FrameAttention args;
  args.video = tokens_of(call, video);
  args.text = tokens_of(call, text);
  args.out = call.view(out, 4);
  args.lse = call.view(lse, 3);
  args.lengths = call.integers(lengths);
  args.text_lengths = call.integers(text_lengths);
  args.video_row = video_row;
  args.text_row = text_row;
  args.mask = mask_of(mask);
  args.q_start = q_start;
  args.text_sees_video = text_sees_video;
  args.exponent = exponent;
  args.gate = call.gate(gate);
  args.ungated = call.view(ungated, 4);
  py::gil_scoped_release unlocked;
  frame_attention_sm90_forward(call.where(), args);
}

}  // namespace

void define_frame_attention(py::module_& m) {
  using namespace py::literals;
  m.def("frame_attention_forward", frame_forward, "op"_a, "video"_a, "text"_a, "out"_a, "lse"_a, "lengths"_a,
        "text_lengths"_a, "video_row"_a, "text_row"_a, "mask"_a, "q_start"_a, "text_sees_video"_a, "exponent"_a,
        "gate"_a, "ungated"_a, "stream"_a);
}

}  // namespace vdcore::cuda
