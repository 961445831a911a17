// Attention of a grid's tokens to windows and to listed tiles, on the CPU, in Python.
#include "cpu/core/bindings.h"

#include "common/tile_plan.h"
#include "cpu/core/bindings_call.h"

namespace vdcore::cpu {
namespace {

using Steps = std::vector<std::pair<int64_t, int64_t>>;

// (heads, tile, shifted, sink, clean, frame_runs, row_steps, column_steps)
WindowsOfHeads windows_of(const py::tuple& given, const GridSizes& sizes) {
  require(given.size() == 8, "windows are (heads, tile, shifted, sink, clean, frame_runs, row_steps, column_steps)");
  WindowsOfHeads w;
  w.heads = given[0].cast<int64_t>();
  const auto tile = given[1].cast<std::vector<int64_t>>();
  require(w.heads > 0 && tile.size() == 3 && *std::min_element(tile.begin(), tile.end()) > 0,
          "heads and the sizes of a tile are at least 1");
  std::copy(tile.begin(), tile.end(), w.tile);
  w.shifted = given[2].cast<bool>();
  w.sink = given[3].cast<int64_t>();
  w.clean = given[4].cast<int64_t>();
  require(w.clean >= 0, "clean frames are at least 0");
  for (const auto& runs : given[5].cast<std::vector<Steps>>()) {
    std::vector<Run>& mine = w.frame_runs.emplace_back();
    for (const auto& [begin, end] : runs) {
      require(begin >= (mine.empty() ? 0 : mine.back().end) && begin <= end && end <= sizes.keys,
              "runs of frames must be sorted and inside of the keys");
      mine.push_back({begin, end});
    }
  }
  require(static_cast<int64_t>(w.frame_runs.size()) == sizes.queries, "there must be runs for every query frame");
  for (auto [steps, from] : {std::pair(&w.rows, given[6]), std::pair(&w.columns, given[7])}) {
    for (const auto& [first, radius] : py::cast<Steps>(from)) steps->push_back({first, radius});
    require(!steps->empty() && steps->size() < 30000, "there must be a radius, and less than 30000");
  }
  return w;
}

OwnedPlan windows_plan(int64_t batch, int64_t queries, int64_t keys, int64_t rows, int64_t columns, int64_t q_start,
                       const std::vector<py::tuple>& groups, const Lengths& lengths, int64_t text,
                       const Lengths& text_lengths, bool text_sees_video) {
  require(batch > 0 && queries > 0 && keys > 0 && rows > 0 && columns > 0 && q_start >= 0 && text >= 0,
          "sizes are at least 1");
  require(std::max(queries, keys) < (int64_t{1} << 31) && rows * columns < (int64_t{1} << 31),
          "frames, and the tokens of a frame, are counted in 32 bits");
  check_lengths(lengths, batch);
  check_lengths(text_lengths, batch);
  const GridSizes sizes = {batch, queries, keys, rows, columns, q_start};
  std::vector<WindowsOfHeads> all;
  for (const py::tuple& group : groups) all.push_back(windows_of(group, sizes));
  return plan_of_windows(sizes, all, data_of(lengths), text, data_of(text_lengths), text_sees_video);
}

// Contiguous int32 memory of these sizes.
const int32_t* ints(const char* name, py::handle capsule, Sizes sizes) {
  const dlpack::Tensor& t = cpu_tensor(capsule);
  if (t.dtype.code != 0 || t.dtype.bits != 32) throw py::type_error(std::string(name) + " must be int32");
  const auto rank = static_cast<int>(sizes.size());
  if (t.ndim != rank || !std::equal(sizes.begin(), sizes.end(), t.shape)) wrong_sizes(name, sizes, t.shape, t.ndim);
  int64_t dense = 1;
  for (int axis = rank - 1; axis >= 0 && t.strides; dense *= larger(t.shape[axis--], 1))
    if (t.shape[axis] > 1 && t.strides[axis] != dense) throw py::value_error(std::string(name) + " must be contiguous");
  return reinterpret_cast<const int32_t*>(static_cast<const char*>(t.data) + t.byte_offset);
}

OwnedPlan lists_plan(int64_t batch, int64_t frames, int64_t rows, int64_t columns, const std::vector<int64_t>& tile,
                     int64_t list_batch, int64_t list_heads, int64_t most, py::handle indices, py::handle counts) {
  require(batch > 0 && frames > 0 && rows > 0 && columns > 0, "sizes are at least 1");
  require(tile.size() == 3 && *std::min_element(tile.begin(), tile.end()) > 0, "the sizes of a tile are at least 1");
  require((list_batch == 1 || list_batch == batch) && list_heads > 0 && most >= 0, "lists are of another call");
  const auto along = [](int64_t size, int64_t step) { return (size + step - 1) / step; };
  const int64_t n = along(frames, tile[0]) * along(rows, tile[1]) * along(columns, tile[2]);
  const int32_t* many = ints("counts", counts, {list_batch, list_heads, n});
  const int32_t* all = ints("indices", indices, {list_batch, list_heads, n, most});
  for (int64_t i = 0; i < list_batch * list_heads * n; ++i) {
    require(many[i] >= 0 && many[i] <= most, "counts must be from 0 to K");
    for (int64_t j = 0; j < many[i]; ++j)
      require(all[i * most + j] > (j ? all[i * most + j - 1] : -1) && all[i * most + j] < n,
              "indices must be ascending and below the number of tiles");
  }
  return plan_of_lists({batch, frames, frames, rows, columns, 0}, tile.data(), list_batch, list_heads, most, all, many);
}

enum class Direction { forward, backward, tangents };

// q, k, v, out, lse; but for forward then dout, dlse, dq, dk, dv. lse and dlse may be None, of tangents dq, dk and dv.
FrameSegment tile_segment(const TilePlan& plan, const std::vector<py::object>& tensors, bool text,
                          Direction direction) {
  require(tensors.size() == (direction == Direction::forward ? 5 : 10),
          "a segment has 5 tensors, and 10 where there are derivatives");
  FrameSegment s;
  s.q = query_view(tensors[0]);
  s.k = key_view(tensors[1], s.q);
  s.v = like("v", tensors[2], s.k);
  const int64_t frames[2] = {text ? 1 : plan.frames[0], text ? 1 : plan.frames[1]};
  const int64_t tokens = text ? plan.text : plan.per_frame();
  require(s.q.size[0] == plan.batch && s.q.size[1] == frames[0] && s.q.size[2] == tokens,
          "the plan is of other queries");
  require(s.k.size[1] == frames[1] && s.k.size[2] == tokens, "the plan is of other keys");
  const Sizes rows = {s.q.size[0], s.q.size[1], s.q.size[2], s.q.size[3]};
  s.out = like("out", tensors[3], s.q);
  s.lse = row_view("lse", tensors[4], rows);
  if (direction == Direction::forward) return s;
  require(static_cast<bool>(s.lse), "derivatives need lse");
  s.dout = like("dout", tensors[5], s.q);
  s.dlse = row_view("dlse", tensors[6], rows);
  const bool tangents = direction == Direction::tangents;
  require(s.dlse || !tangents, "dlse must be given");
  const auto derivative = [&](const char* name, int at, const TensorView& of) {
    return tangents ? optional_like(name, tensors[at], of) : like(name, tensors[at], of);
  };
  s.dq = derivative("dq", 7, s.q);
  s.dk = derivative("dk", 8, s.k);
  s.dv = derivative("dv", 9, s.k);
  return s;
}

TileAttention tile_call(const OwnedPlan& owned, const std::vector<py::object>& video,
                        const std::vector<py::object>& text, float scale, int threads, Direction direction) {
  TileAttention args;
  const TilePlan& plan = owned.plan;
  const FrameSegment& s = args.segment[0] = tile_segment(plan, video, false, direction);
  const int64_t H = s.q.size[3], G = s.k.size[3], D = s.q.size[4];
  if (plan.text) {
    const FrameSegment& t = args.segment[1] = tile_segment(plan, text, true, direction);
    require(t.q.size[3] == H && t.k.size[3] == G && t.q.size[4] == D, "text must have the heads of the video");
    for (const auto& [x, y] : {std::pair(&s.dq, &t.dq), std::pair(&s.dk, &t.dk), std::pair(&s.dv, &t.dv)})
      require(static_cast<bool>(*x) == static_cast<bool>(*y), "video and text have the same tangents");
  }
  if (plan.has_lists()) {
    require(plan.list_heads == 1 || plan.list_heads == H, "lists are of other heads");
  } else {
    require(plan.group_count > 0 && plan.groups[plan.group_count - 1].end_head == H, "windows are of other heads");
    for (int64_t g = 0; g < plan.group_count; ++g)
      require(plan.groups[g].end_head % (H / G) == 0, "heads that share a key are of one group");
  }
  args.plan = &plan;
  args.scale = scale;
  const double rows = static_cast<double>(plan.frames[0] * plan.per_frame() + plan.text);
  const double of_text = 2 * rows * static_cast<double>(plan.text * plan.batch * H);
  const double pairs = owned.pairs * (plan.has_lists() ? static_cast<double>(H) : 1) + of_text;
  args.threads = worthwhile_threads(threads, 2 * pairs * static_cast<double>(D));
  return args;
}

void tile_attention_forward(const OwnedPlan& plan, const std::vector<py::object>& video,
                            const std::vector<py::object>& text, float scale, int threads) {
  const TileAttention args = tile_call(plan, video, text, scale, threads, Direction::forward);
  py::gil_scoped_release unlocked;
  kernels().tile_attention_forward(args);
}

// `delta`: float32 (B, H, rows).
void tile_attention_backward(const OwnedPlan& plan, const std::vector<py::object>& video,
                             const std::vector<py::object>& text, float scale, py::handle delta, int threads) {
  TileAttention args = tile_call(plan, video, text, scale, threads, Direction::backward);
  const TensorView& q = args.segment[0].q;
  args.delta = floats("delta", delta, {q.size[0], q.size[3], q.size[1] * q.size[2] + plan.plan.text});
  require(args.delta, "delta must be given");
  py::gil_scoped_release unlocked;
  kernels().tile_attention_backward(args);
}

void tile_attention_tangents(const OwnedPlan& plan, const std::vector<py::object>& video,
                             const std::vector<py::object>& text, float scale, int threads) {
  const TileAttention args = tile_call(plan, video, text, scale, threads, Direction::tangents);
  py::gil_scoped_release unlocked;
  kernels().tile_attention_tangents(args);
}

}  // namespace

void define_tile_attention(py::module_& m) {
  using namespace py::literals;
  py::class_<OwnedPlan>(m, "TilePlan").def_readonly("pairs", &OwnedPlan::pairs);
  m.def("windows_plan", windows_plan, "batch"_a, "queries"_a, "keys"_a, "rows"_a, "columns"_a, "q_start"_a, "groups"_a,
        "lengths"_a, "text"_a, "text_lengths"_a, "text_sees_video"_a);
  m.def("lists_plan", lists_plan, "batch"_a, "frames"_a, "rows"_a, "columns"_a, "tile"_a, "list_batch"_a,
        "list_heads"_a, "most"_a, "indices"_a, "counts"_a);
  m.def("tile_attention_forward", tile_attention_forward, "plan"_a, "video"_a, "text"_a, "scale"_a, "threads"_a);
  m.def("tile_attention_tangents", tile_attention_tangents, "plan"_a, "video"_a, "text"_a, "scale"_a, "threads"_a);
  m.def("tile_attention_backward", tile_attention_backward, "plan"_a, "video"_a, "text"_a, "scale"_a, "delta"_a,
        "threads"_a);
}

}  // namespace vdcore::cpu
