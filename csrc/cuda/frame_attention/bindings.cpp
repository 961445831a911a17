// Frame attention in Python.
#include "cuda/frame_attention/bindings.h"

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
  args.gate = call.view(gate, 5);
  args.ungated = call.view(ungated, 4);
  py::gil_scoped_release unlocked;
  frame_attention_sm90_forward(call.where(), args);
}

}  // namespace

void define_frame_attention(py::module_& m) { m.def("cuda_frame_attention_forward", frame_forward); }

}  // namespace vdcore::cuda
