// Temporal attention, forward: how a call is cut into items and steps, and how results leave a step. Products in
// float32 (forward.cpp) and in pairs of bfloat16 (forward_amx.cpp) share it.
#pragma once

#include "common/threads.h"
#include "cpu/temporal_attention/tiles.h"

namespace vdcore::cpu::VDCORE_ISA {

struct TemporalPlan {
  const TemporalAttention& a;
  Shape shape;
  int64_t query_block, key_block;  // frames
  int64_t heads;                   // query heads of one step
  int64_t positions;               // of one item
  int64_t chunks, head_groups;
  bool split_heads;  // head groups are items of their own
  bool stream;

  // `room`: values that a step's rows of Q, K and V may be.
  TemporalPlan(const TemporalAttention& args, int64_t room) : a(args), shape(args) {
    constexpr int64_t kMaxQueryBlock = 64;
    const Shape& n = shape;
    query_block = smaller(round_up(n.T), kMaxQueryBlock);
    heads = n.H;
    // Fewer heads, at least one group, until the stage fits; then fewer keys.
    while (heads > n.group && heads * query_block * n.row + 2 * heads / n.group * n.K * n.row > room)
      heads = n.fewer_heads(heads);
    const int64_t left = larger(room - heads * query_block * n.row, W * 2 * n.row);
    key_block = smaller(n.K, left / (2 * heads / n.group * n.row));
    head_groups = n.H / heads;
    positions = larger(1, smaller(64, n.B * n.S / (8 * a.threads)));
    chunks = (n.S + positions - 1) / positions;
    split_heads = n.B * chunks < 4 * a.threads;
    stream = streams(a.out);
  }

  int64_t items() const { return shape.B * chunks * (split_heads ? head_groups : 1); }
  bool one_key_block() const { return key_block >= shape.K; }
};

// Of the queries of a step.
struct TemporalResults {
  Stage out;             // sums of exp2(score - maximum) * v
  float *maximum, *sum;  // (heads, query_block), scores in base 2

  TemporalResults(const TemporalPlan& p, Arena& arena) {
    out = {arena.floats(p.heads * p.query_block * p.shape.row), p.query_block, p.shape.row};
    maximum = arena.floats(p.heads * p.query_block);
    sum = arena.floats(p.heads * p.query_block);
  }
};

template <DType T>
void write_rows(const TemporalPlan& p, const TemporalResults& t, const Place& place, Run queries) {
  const auto [b, s, heads] = place;
  const TensorView& out = p.a.out;
  const int64_t head_bytes = out.stride[3] * size_of(T);
  for (int64_t i = queries.begin; i < queries.end; ++i) {
    char* row = out.at(b, i, s, heads.first);
    for (int64_t h = 0; h < heads.count; ++h, row += head_bytes) {
      const float* in = t.out.head(h).at(i - queries.begin, 0).data;
      const float sum = t.sum[h * p.query_block + i - queries.begin];
      const float factor = sum == 0 ? 0 : 1 / sum;
      if (p.stream)
        stream_row<T>(row, p.shape.D, in, factor);
      else
        write_row<T>(row, p.shape.D, in, factor);
    }
  }
}

inline void write_lse(const TemporalPlan& p, const TemporalResults& t, const Place& place, Run queries) {
  const auto [b, s, heads] = place;
  for (int64_t h = 0; h < heads.count; ++h)
    for (int64_t i = 0; i < queries.size(); i += W) {
      const int64_t at = h * p.query_block + i;
      float lanes[W];
      store(lanes, log_sum_exp({load(t.maximum + at), load(t.sum + at)}));
      for (int64_t lane = 0; lane < smaller(W, queries.size() - i); ++lane)
        *reinterpret_cast<float*>(p.a.lse.at(b, queries.begin + i + lane, s, heads.first + h)) = lanes[lane];
    }
}

inline void write_results(const TemporalPlan& p, const TemporalResults& t, const Place& place, Run queries) {
  with_dtype(p.a.out.dtype, [&](auto type) { write_rows<decltype(type)::value>(p, t, place, queries); });
  if (p.a.lse) write_lse(p, t, place, queries);
}

// A Step has
//   Step(plan, arena)
//   bytes_at_once(): of the next step's rows, how many it asks for at a time
//   run(place, prefetch): attention at one position
template <typename Step>
void run_temporal_item(const TemporalPlan& p, int64_t item) {
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

  const TensorView* const tensors[] = {&p.a.q, &p.a.k, &p.a.v};
  for (int64_t i = 0; i < steps; ++i) {
    const auto position = [&](int64_t index) { return s0 + index / groups; };
    const auto head = [&](int64_t index) { return (first_group + index % groups) * p.heads; };
    NextRows next{tensors, 3, b, position(i + 1), head(i + 1), p.heads};
    Prefetch prefetch;
    if (i + 1 < steps && p.one_key_block() && p.query_block >= n.T) {
      prefetch.source = NextRows::next;
      prefetch.context = &next;
      prefetch.stride = step.bytes_at_once();
    }
    step.run({b, position(i), {head(i), p.heads}}, prefetch);
  }
  stream_fence();
}

template <typename Step>
void run_temporal(const TemporalPlan& plan) {
  parallel_for(
      plan.items(), plan.a.threads,
      [](void* p, int64_t item) { run_temporal_item<Step>(*static_cast<const TemporalPlan*>(p), item); },
      const_cast<TemporalPlan*>(&plan));
}

}  // namespace vdcore::cpu::VDCORE_ISA
