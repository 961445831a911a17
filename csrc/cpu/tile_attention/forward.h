// Attention of a grid's tokens to windows and listed tiles, forward: the online softmax of frame attention
// (frame_attention/forward.h), for units of one to three vectors of queries, over the runs of a tile that a unit sees.
//
// A pair costs 2 D multiply-adds and an exponential wherever somebody of its unit sees the key, and two comparisons
// more where not everybody does; a key is gathered once for a box of up to 192 queries. So what is lost against dense
// attention is what units see beyond their windows.
//
// `Products` is how a unit meets a tile: in vectors, or in pairs of bfloat16.
#pragma once

#include "cpu/tile_attention/job.h"
#include "cpu/tile_attention/strange.h"

namespace vdcore::cpu::VDCORE_ISA {

// What a box has while it sees the other side.
struct ForwardState {
  const TileAttention& a;
  const TilePlan& plan;
  const int64_t D, row;
  Box box;
  int64_t kv_head = 0;
  Slots* slots;
  UnitView* view;
  OtherTile* tile;
  Tile out;              // (kBoxTokens, row): sums of exp2(score - maximum) * v
  Tile stage;            // (kMostLanes, row)
  float *maximum, *sum;  // of slots: scores in base 2
  float* center;         // (row,): what has been subtracted from every value

  ForwardState(const TileAttention& args, Arena& arena)
      : a(args), plan(*args.plan), D(args.segment[0].q.size[4]), row(round_up(D)) {
    slots = reinterpret_cast<Slots*>(arena.floats((sizeof(Slots) + 3) / 4));
    view = reinterpret_cast<UnitView*>(arena.floats((sizeof(UnitView) + 3) / 4));
    tile = reinterpret_cast<OtherTile*>(arena.floats((sizeof(OtherTile) + 3) / 4));
    out = {arena.floats(kBoxTokens * row), row};
    stage = {arena.floats(larger(kMostLanes, 2) * row), row};
    for (float** x : {&maximum, &sum}) *x = arena.floats(kBoxTokens);
    center = arena.floats(row);
  }

  VDCORE_INLINE int64_t all_slots() const { return slots->units * slots->lanes; }
};

// A Products has
//   Products(ForwardState&, arena)
//   kTile: tokens of the other side that it takes at once; kCenters: whether gather() subtracts the center from values
//   load_queries(), gather(): what the tile holds, attend(unit), whose view has been found; finish(): out is complete
template <typename Products>
class Forward {
 public:
  Forward(const TileAttention& a, Arena& arena) : s(a, arena), products(s, arena) {}

  void run(const Box& box, const Shape* shape) {
    const FrameSegment& segment = s.a.segment[box.text];
    s.box = box;
    s.kv_head = box.head / (segment.q.size[3] / segment.k.size[3]);
    const int64_t list = s.plan.list_of(box.sample, box.head);
    find_slots(s.plan, box, kQueries, shape, *s.slots);
    for_dead(s.plan, box, kQueries, [&](const TokenRun& tokens) { clear(tokens); });
    if (!s.slots->run_count) return;
    products.load_queries();
    find_center(list);
    for (int64_t i = 0; i < s.all_slots(); i += W) {
      store(s.maximum + i, splat(-kInf));
      store(s.sum + i, vf{});
    }
    memset(s.out.data, 0, s.all_slots() * s.row * sizeof(float));
    s.tile->start(Products::kTile);
    const auto flush = [&] {
      products.gather();
      for (int64_t u = 0; u < s.slots->units; ++u) {
        find_view(s.plan, box, kQueries, *s.slots, u, *s.tile, *s.view);
        if (s.view->run_count) products.attend(u);
      }
    };
    for_segments(s.plan, box, kQueries, list, false, [&](const Segment& segment) { s.tile->add(segment, flush); });
    s.tile->finish(flush);
    products.finish();
    finish(segment);
  }

 private:
  ForwardState s;
  Products products;

  // As in frame attention; 0 also where the whole box sees few keys: their mean says little of the others.
  void find_center(int64_t list) const {
    memset(s.center, 0, s.row * sizeof(float));
    if (!Products::kCenters || s.a.segment[0].v.dtype != DType::f32) return;
    float* squares = s.stage.at(1, 0).data;
    const int64_t count = mean_of_common(s.plan, s.box, kQueries, list, s.a.segment, &FrameSegment::v, s.kv_head,
                                         kCenterValues, s.stage, s.center, squares);
    for (int64_t c = 0; c < s.row; c += W) {
      const vf mean = load(s.center + c), square = load(squares + c);
      store(s.center + c, select(2.f * mean * mean > square, mean, vf{}));
    }
    if (count < kCenterValues / 2) memset(s.center, 0, s.row * sizeof(float));
  }

  void finish(const FrameSegment& segment) const {
    const Slots& slots = *s.slots;
    for (int64_t u = 0; u < slots.units; ++u)
      for (int64_t i = u * slots.lanes; i < u * slots.lanes + slots.filled[u]; ++i) {
        const float factor = s.sum[i] == 0 ? 0 : 1 / s.sum[i];
        float* at = s.out.at(i, 0).data;
        for (int64_t c = 0; c < s.row; c += W)
          store(at + c, load(at + c) * factor + (factor == 0 ? vf{} : load(s.center + c)));
      }
    if (segment.lse)
      for (int64_t i = 0; i < s.all_slots(); i += W)
        store(s.sum + i, log_sum_exp({load(s.maximum + i), load(s.sum + i)}));
    slots.for_runs([&](const SlotRun& r) {
      scatter_run(segment.out, s.box.sample, s.box.head, r.tokens, s.out.at(r.slot, 0), 1);
      if (segment.lse)
        for_each_row(segment.lse, s.box.sample, s.box.head, r.tokens,
                     [&](char* at, int64_t i) { *reinterpret_cast<float*>(at) = s.sum[r.slot + i]; });
    });
  }

  // Of tokens that take no part.
  void clear(TokenRun tokens) const {
    const FrameSegment& segment = s.a.segment[tokens.text];
    clear_run(segment.out, s.box.sample, s.box.head, tokens);
    if (segment.lse)
      for_each_row(segment.lse, s.box.sample, s.box.head, tokens,
                   [&](char* at, int64_t) { *reinterpret_cast<float*>(at) = -kInf; });
  }
};

}  // namespace vdcore::cpu::VDCORE_ISA
