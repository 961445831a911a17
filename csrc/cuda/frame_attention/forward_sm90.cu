#include <algorithm>

#include "cuda/core/dispatch.h"
#include "cuda/core/tensor_map.h"
#include "cuda/frame_attention/forward_sm90.cuh"
#include "cuda/frame_attention/frame_attention.h"

namespace vdcore::cuda {
namespace {

// ---- Plans ----
// All predicted, see the head of forward_sm90.cuh. A plan serves up to its D channels: the accelerator fills
// the others of the last column with zeros.

using Plan64 = FramePlan<64, 3, 128, 2>;  // three warpgroups share what is loaded
using Plan80 = FramePlan<80, 2, 176, 2>;
using Plan96 = FramePlan<96, 2, 176, 2>;
using Plan128 = FramePlan<128, 2, 176, 2>;       // as many keys as shared memory holds twice
using Plan128Short = FramePlan<128, 2, 128, 2>;  // where runs end shortly after a multiple of 128 keys
constexpr int64_t kMostChannels = 128;

// ---- How tokens lie in memory ----

int64_t stride_of(const TensorView& x, int axis) { return x.size[axis] > 1 ? x.stride[axis] : 0; }

// Tokens follow one another at even distances through all frames.
bool flat(const TensorView& x) { return x.size[1] == 1 || x.size[2] == 1 || x.stride[1] == x.size[2] * x.stride[2]; }

int64_t token_stride(const TensorView& x) { return x.size[2] > 1 ? stride_of(x, 2) : stride_of(x, 1); }

// A map takes no stride of 0; where there is nothing to step to, any other will do.
MapShape shape_of(const TensorView& x, int32_t columns, int32_t rows) {
  return {x.dtype,
          x.data,
          {x.size[4], 1, 1, x.size[3], x.size[0]},
          {1, 8, 8, std::max<int64_t>(stride_of(x, 3), 8), std::max<int64_t>(stride_of(x, 0), 8)},
          columns,
          rows};
}

// channels x tokens of a frame x frames x heads x batch, or all tokens as one frame.
TensorMap frames_map(const Where& where, const TensorView& x, bool as_one, int32_t columns, int32_t rows) {
  MapShape shape = shape_of(x, columns, rows);
  shape.size[1] = as_one ? x.size[1] * x.size[2] : x.size[2];
  shape.size[2] = as_one ? 1 : x.size[1];
  shape.stride[1] = std::max<int64_t>(as_one ? token_stride(x) : stride_of(x, 2), 8);
  shape.stride[2] = std::max<int64_t>(as_one ? 0 : stride_of(x, 1), 8);
  return make_tensor_map(where, shape);
}

// channels x window x tokens x heads x batch: window t holds so many rows from token t on. The last ones end
// behind the tensor, and no box touches that part.
TensorMap windows_map(const Where& where, const TensorView& x, int32_t columns, int32_t window, int32_t rows) {
  MapShape shape = shape_of(x, columns, rows);
  shape.size[1] = window;
  shape.size[2] = x.size[1] * x.size[2];
  shape.stride[1] = shape.stride[2] = std::max<int64_t>(token_stride(x), 8);
  return make_tensor_map(where, shape);
}

template <class Plan>
FrameSource source_of(const Where& where, const FrameTokens& x) {
  FrameSource source{};
  const bool q_flat = flat(x.q), k_flat = flat(x.k) && flat(x.v);
  const auto keys_map = [&](const TensorView& of, int32_t columns) {
    return k_flat ? windows_map(where, of, columns, Plan::kKeys, Plan::kBoxRows)
                  : frames_map(where, of, false, columns, Plan::kBoxRows);
  };
  source.q = frames_map(where, x.q, q_flat, 64, Plan::kRows);
  source.k = keys_map(x.k, 64);
  source.v = keys_map(x.v, Plan::kValueColumn);
  source.q_frame = q_flat ? 0 : static_cast<int32_t>(x.q.size[2]);
  source.k_frame = k_flat ? 0 : static_cast<int32_t>(x.k.size[2]);
  return source;
}

// ---- Work ----

QueryTiles tiles_of(const FrameAttention& call) {
  const TensorView &q = call.video.q, &k = call.video.k;
  QueryTiles tiles;
  tiles.queries = static_cast<int32_t>(q.size[1]);
  tiles.keys = static_cast<int32_t>(k.size[1]);
  tiles.tokens = static_cast<int32_t>(q.size[2]);
  tiles.text = call.text.q ? static_cast<int32_t>(call.text.q.size[2]) : 0;
  tiles.q_start = static_cast<int32_t>(call.q_start);
  tiles.text_sees_video = call.text_sees_video;
  // Numbers beyond the video are cut down: products with them then stay inside 32 bits.
  const int64_t frames = std::max(k.size[1], call.q_start + q.size[1]);
  WindowMask& mask = tiles.mask = call.mask;
  mask.chunk = std::min(mask.chunk, frames);
  mask.sink = std::min(mask.sink, frames);
  const int64_t chunks = (frames + mask.chunk - 1) / mask.chunk;
  for (int64_t* bound : {&mask.past, &mask.future})
    if (*bound >= chunks) *bound = -1;
  tiles.group = static_cast<int32_t>(!flat(q) ? 1 : mask.full() ? frames : mask.chunk);
  return tiles;
}

struct Work {
  int64_t tiles = 0;  // of keys, all query frames together
  bool even = true;   // every query frame sees the same number
};

Work work_of(const FrameAttention& call, const QueryTiles& tiles, int32_t keys) {
  Work work;
  const int64_t frame = flat(call.video.k) && flat(call.video.v) ? 0 : tiles.tokens;
  int64_t first = -1;
  for (int32_t t = 0; t < tiles.queries; ++t) {
    Run runs[2];
    tiles.mask.visible(tiles.q_start + t, tiles.keys, runs[0], runs[1]);
    int64_t mine = 0;
    for (const Run& run : runs)
      mine += frame ? run.size() * ((frame + keys - 1) / keys) : (run.size() * tiles.tokens + keys - 1) / keys;
    if (first < 0) first = mine;
    work.tiles += mine;
    work.even = work.even && mine == first;
  }
  work.even = work.even && !call.lengths && !call.text.q;
  return work;
}

// Blocks of a cluster: two, where few tiles are left without another of their group.
template <class Plan>
int32_t blocks_of_cluster(QueryTiles tiles) {
  const int32_t alone = tiles.count();
  tiles.side = 2;
  return Plan::kCluster == 2 && tiles.count() - alone <= alone / 50 ? 2 : 1;
}

template <class Plan, typename E>
void run(const Where& where, const FrameAttention& call, QueryTiles tiles) {
  const TensorView& q = call.video.q;
  FrameParameters p{};
  tiles.rows = Plan::kRows;
  p.cluster = tiles.side = blocks_of_cluster<Plan>(tiles);
  p.tiles = tiles;
  p.video = source_of<Plan>(where, call.video);
  if (call.text.q) p.text = source_of<Plan>(where, call.text);
  p.lengths = call.lengths;
  p.text_lengths = call.text_lengths;
  p.out = call.out.data;
  p.lse = reinterpret_cast<float*>(call.lse.data);
  p.gate = call.gate;
  p.ungated = call.ungated.data;
  p.rows = call.out.size[1];
  p.video_row = call.video_row;
  p.text_row = call.text_row;
  p.heads = static_cast<int32_t>(q.size[3]);
  p.ratio = static_cast<int32_t>(q.size[3] / call.video.k.size[3]);
  p.channels = static_cast<int32_t>(q.size[4]);
  p.exponent = call.exponent;
  const int64_t all = q.size[0] * q.size[3] * tiles.count();
  if (all > kMaxBlocks) launch_error(where, "more than 2147483647 tiles of queries");
  p.items = static_cast<int32_t>(all / p.cluster);
  // Where all tiles cost the same, one block per SM takes them in turn and loads the next one's tokens while it stores.
  // Otherwise one block per tile: the hardware hands them out, the longest first.
  const bool even = work_of(call, tiles, Plan::kKeys).even;
  const int32_t clusters = even ? std::min(p.items, std::max(multiprocessors(where) / p.cluster, 1)) : p.items;
  p.blocks = clusters * p.cluster;
  launch<frame_attention_sm90_fwd_kernel<Plan, E>>(where, {p.blocks, Plan::kThreads, Plan::kShared, p.cluster}, p);
}

template <typename E>
void run_type(const Where& where, const FrameAttention& call) {
  const int64_t channels = call.video.q.size[4];
  const QueryTiles tiles = tiles_of(call);
  if (channels <= 64) return run<Plan64, E>(where, call, tiles);
  if (channels <= 80) return run<Plan80, E>(where, call, tiles);
  if (channels <= 96) return run<Plan96, E>(where, call, tiles);
  // Predicted: tiles of 128 keys cost 4 % more per key, which tiles that are partly empty can outweigh.
  const int64_t large = work_of(call, tiles, Plan128::kKeys).tiles * Plan128::kKeys;
  const int64_t small = work_of(call, tiles, Plan128Short::kKeys).tiles * Plan128Short::kKeys;
  if (small * 26 < large * 25) return run<Plan128Short, E>(where, call, tiles);
  return run<Plan128, E>(where, call, tiles);
}

}  // namespace

std::string why_not_frame_attention_sm90(const FrameAttention& call) {
  const TensorView& video = call.video.q;
  if (video.dtype == DType::f32) return "it multiplies float16 and bfloat16";
  if (video.size[4] % 8 || video.size[4] > kMostChannels)
    return "head_dim must be a multiple of 8 up to 128, got " + std::to_string(video.size[4]);
  for (const FrameTokens* tokens : {&call.video, &call.text}) {
    if (!tokens->q) continue;
    for (const TensorView* x : {&tokens->q, &tokens->k, &tokens->v}) {
      if (reinterpret_cast<uintptr_t>(x->data) % 16) return "tensors must begin at multiples of 16 bytes";
      for (int axis = 0; axis < 4; ++axis)
        if (x->size[axis] > 1 && (x->stride[axis] % 8 || x->stride[axis] <= 0 || x->stride[axis] >= int64_t{1} << 39))
          return "strides must be multiples of 16 bytes, above 0 and below 2^40, got " +
                 std::to_string(x->stride[axis]) + " elements";
    }
  }
  const int64_t frames = std::max(call.video.k.size[1], call.q_start + video.size[1]);
  if (frames * video.size[2] + call.out.size[1] >= (int64_t{1} << 31) - 512)
    return "it counts the tokens of a sample in 32 bits";
  return "";
}

void frame_attention_sm90_forward(const Where& where, const FrameAttention& call) {
  const std::string reason = why_not_frame_attention_sm90(call);
  if (!reason.empty()) launch_error(where, reason);
  with_element(where, call.video.q.dtype, [&](auto e) { run_type<decltype(e)>(where, call); });
}

}  // namespace vdcore::cuda
