// How a call of temporal attention is cut into items and steps, and how its steps run: shared by forward and tangents,
// in float32 and in pairs of bfloat16.
#pragma once

#include <initializer_list>

#include "common/threads.h"
#include "cpu/temporal_attention/tiles.h"

namespace vdcore::cpu::VDCORE_ISA {

struct TemporalPlan {
  const TemporalAttention& a;
  Shape shape;
  const TensorView* tensors[6];  // that a step reads, q the first
  int count = 0;
  int64_t query_block, key_block;  // frames
  int64_t heads;                   // query heads of one step
  int64_t positions;               // of one item
  int64_t chunks, head_groups;
  bool split_heads;  // head groups are items of their own
  bool stream;

  // `queries` and `keys`: tensors of rows that a step stages; `room`: values that these may be; `out`: the result.
  TemporalPlan(const TemporalAttention& args, std::initializer_list<const TensorView*> read, const TensorView& out,
               int64_t queries, int64_t keys, int64_t room)
      : a(args), shape(args) {
    constexpr int64_t kMaxQueryBlock = 64;
    const Shape& n = shape;
    for (const TensorView* x : read)
      if (*x) tensors[count++] = x;
    query_block = smaller(round_up(n.T), kMaxQueryBlock);
    heads = n.H;
    // Fewer heads, at least one group, until the stage fits; then fewer keys.
    const int64_t query_rows = queries * query_block * n.row, key_row = keys * n.row;
    while (heads > n.group && heads * query_rows + heads / n.group * n.K * key_row > room) heads = n.fewer_heads(heads);
    const int64_t left = larger(room - heads * query_rows, W * key_row);
    key_block = smaller(n.K, larger(left / (heads / n.group * key_row), 1));
    head_groups = n.H / heads;
    positions = larger(1, smaller(64, n.B * n.S / (8 * a.threads)));
    chunks = (n.S + positions - 1) / positions;
    split_heads = n.B * chunks < 4 * a.threads;
    stream = streams(out);
  }

  int64_t items() const { return shape.B * chunks * (split_heads ? head_groups : 1); }
  bool one_query_block() const { return query_block >= shape.T; }
  bool one_key_block() const { return key_block >= shape.K; }
  int64_t rows() const { return heads * query_block; }  // of queries, of a step

  // Of a head, at one position, in all tensors.
  int64_t bytes_of_head() const {
    int64_t bytes = 0;
    for (int i = 0; i < count; ++i) {
      const TensorView& x = *tensors[i];
      bytes += x.size[1] * x.size[3] * x.size[4] * size_of(x.dtype);
    }
    return bytes / shape.H;
  }
  // Of the next step, how many bytes float32 products of this one ask for at a time, if they take so many products of
  // scores and of results.
  int64_t bytes_at_once(int64_t of_scores, int64_t of_results) const {
    const Shape& n = shape;
    const int64_t scores = (n.K + block_rows(2) - 1) / block_rows(2) * ((round_up(n.T) / W + 2) / 3) * n.D,
                  results = (n.T + block_rows(3) - 1) / block_rows(3) * ((n.row / W + 2) / 3) * n.K;
    return smaller(64, larger(1, bytes_of_head() / larger(1, scores * of_scores + results * of_results)));
  }
};

// to = (channels, queries) of a head of x, in float32, times the scale of scores in base 2: from its stage, or from
// where its rows lie.
inline void transpose_queries(const TemporalPlan& p, const TensorView& x, bool in_place, const Stage& stage,
                              const Place& place, int64_t head, Run queries, Tile to) {
  const float scale = p.a.scale * kLog2E;
  if (!in_place) return transpose(queries.size(), p.shape.D, stage.head(head), scale, to);
  const char* at = x.at(place.b, queries.begin, place.s, place.heads.first + head);
  with_dtype(x.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    transpose_in_place<kType>(queries.size(), p.shape.D, at, x.stride[1] * size_of(kType), scale, to);
  });
}

// A Step has
//   Plan: TemporalPlan, or what begins with one
//   Step(plan, arena)
//   bytes_at_once(): of the next step's rows, how many it asks for at a time
//   run(place, prefetch): attention at one position
template <typename Step>
void run_temporal_item(const typename Step::Plan& p, int64_t item) {
  const Shape& n = p.shape;
  Arena count(nullptr);
  Step(p, count);
  Arena arena(scratch(count.used()));
  Step step(p, arena);

  int64_t first_group = 0, groups = p.head_groups;
  if (p.split_heads) {
    first_group = item % p.head_groups;
    groups = 1;
    item /= p.head_groups;
  }
  const int64_t b = item / p.chunks, s0 = item % p.chunks * p.positions;
  const int64_t steps = smaller(p.positions, n.S - s0) * groups;

  for (int64_t i = 0; i < steps; ++i) {
    const auto position = [&](int64_t index) { return s0 + index / groups; };
    const auto head = [&](int64_t index) { return (first_group + index % groups) * p.heads; };
    NextRows next{p.tensors, p.count, b, position(i + 1), head(i + 1), p.heads};
    Prefetch prefetch;
    if (i + 1 < steps && p.one_key_block() && p.one_query_block()) {
      prefetch.source = NextRows::next;
      prefetch.context = &next;
      prefetch.stride = step.bytes_at_once();
    }
    step.run({b, position(i), {head(i), p.heads}}, prefetch);
  }
  stream_fence();
}

template <typename Step>
void run_temporal(const typename Step::Plan& plan) {
  using Plan = typename Step::Plan;
  parallel_for(
      plan.items(), plan.a.threads,
      [](void* p, int64_t item) { run_temporal_item<Step>(*static_cast<const Plan*>(p), item); },
      const_cast<Plan*>(&plan));
}

}  // namespace vdcore::cpu::VDCORE_ISA
