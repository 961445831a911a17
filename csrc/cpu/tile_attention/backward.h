// Attention of a grid's tokens to windows and listed tiles, backward: with P recomputed from lse and delta
// = rowsum(dout * out) - dlse,
//   dV = P^T dO,   dS = P * (dO V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q.
//
// Two passes, seven products, in which every box has one owner: gradients of queries, then of keys and values, each
// with its own side in the lanes and the other one streaming by. So memory does not grow with tokens, and the bits do
// not depend on threads. The first pass knows what a row of dS adds up to, dlse but for rounding, and so how much delta
// errs (see frame_attention/backward.h): it takes that out of dQ, and leaves a better delta to the second.
//
// `Products` is how a unit meets a tile: in vectors, or in pairs of bfloat16.
#pragma once

#include "common/threads.h"
#include "cpu/tile_attention/strange.h"

namespace vdcore::cpu::VDCORE_ISA {

using Tensors = TensorView FrameSegment::*;

struct BackwardState {
  const TileAttention& a;
  const TilePlan& plan;
  const int64_t D, row;
  Slots* slots;
  UnitView* view;
  OtherTile* tile;
  Tile gradient[2];  // (kBoxTokens, row): dq, or dk and dv
  Tile stage;        // (kMostLanes, row)
  float *p, *ds;     // (kOtherTile, lanes)

  BackwardState(const TileAttention& args, Arena& arena)
      : a(args), plan(*args.plan), D(args.segment[0].q.size[4]), row(round_up(D)) {
    slots = reinterpret_cast<Slots*>(arena.floats((sizeof(Slots) + 3) / 4));
    view = reinterpret_cast<UnitView*>(arena.floats((sizeof(UnitView) + 3) / 4));
    tile = reinterpret_cast<OtherTile*>(arena.floats((sizeof(OtherTile) + 3) / 4));
    for (Tile& x : gradient) x = {arena.floats(kBoxTokens * row), row};
    stage = {arena.floats(kMostLanes * row), row};
    for (float** x : {&p, &ds}) *x = arena.floats(kOtherTile * kMostLanes);
  }
};

// A Products has
//   Products(BackwardState&, arena); factor(): from one of p to a score in base 2; rounded(vf): as a weight counts
//   load_own(x, box, which): the box's rows, which 0 (q, k) or 1 (dout, v), and start(gradients): these are 0
//   gather(tensors, box, head, gradients): what the tile holds of two tensors, the first so many of which make
//   gradients scores(unit): p and ds of the unit's runs are sums over channels add(unit, weights, tensor, gradient,
//   ...): gradient += weights^T tensor finish(gradients): gradients are complete
template <typename Products>
class Backward {
 public:
  Backward(const TileAttention& args, Arena& arena)
      : s(args, arena),
        products(s, arena),
        a(args),
        plan(*args.plan),
        slots(s.slots),
        tile(s.tile),
        H(args.segment[0].q.size[3]),
        shared(H / args.segment[0].k.size[3]),
        row(s.row),
        video_rows(plan.frames[0] * plan.per_frame()),
        all_rows(video_rows + plan.text) {
    stage_out = {arena.floats(kMostLanes * row), row};
    for (float** x : {&lse, &delta, &row_sum}) *x = arena.floats(larger(kBoxTokens, kOtherTile));
    mean = arena.floats(row);
  }

  // dq of a box of queries.
  void queries(const Box& box, const Shape* shape) {
    const FrameSegment& segment = a.segment[box.text];
    const int64_t list = plan.list_of(box.sample, box.head), kv_head = box.head / shared;
    find_slots(plan, box, kQueries, shape, *slots);
    for_dead(plan, box, kQueries, [&](const TokenRun& tokens) { clear_run(segment.dq, box.sample, box.head, tokens); });
    if (!slots->run_count) return;
    load_queries(segment, box);
    start(1);
    const auto flush = [&] { query_tile(box, kv_head); };
    for_segments(plan, box, kQueries, list, false, [&](const Segment& s) { tile->add(s, flush); });
    tile->finish(flush);
    products.finish(1);
    mean_of_common(plan, box, kQueries, list, a.segment, &FrameSegment::k, kv_head, 32, s.stage, mean, nullptr);
    slots->for_runs([&](const SlotRun& r) {
      float* kept = delta_of(box.sample, box.head, r.tokens);
      if (segment.dlse)
        for_each_row(segment.dlse, box.sample, box.head, r.tokens,
                     [&](const char* at, int64_t i) { row_sum[r.slot + i] -= *reinterpret_cast<const float*>(at); });
      for (int64_t i = 0; i < r.tokens.size(); ++i) {
        const float error = row_sum[r.slot + i];
        kept[i] += error;
        float* at = s.gradient[0].at(r.slot + i, 0).data;
        for (int64_t c = 0; c < row; c += W) store(at + c, load(at + c) - error * load(mean + c));
      }
      scatter_run(segment.dq, box.sample, box.head, r.tokens, s.gradient[0].at(r.slot, 0), a.scale);
    });
  }

  // dk and dv of a box of keys, `head` their own.
  void keys(const Box& box, const Shape* shape) {
    const FrameSegment& segment = a.segment[box.text];
    find_slots(plan, box, kKeys, shape, *slots);
    for (const TensorView* x : {&segment.dk, &segment.dv})
      for_dead(plan, box, kKeys, [&](const TokenRun& tokens) { clear_run(*x, box.sample, box.head, tokens); });
    if (!slots->run_count) return;
    products.load_own(segment.k, box, 0);
    products.load_own(segment.v, box, 1);
    start(2);
    for (int64_t h = box.head * shared; h < (box.head + 1) * shared; ++h) {
      const auto flush = [&] { key_tile(box, h); };
      for_segments(plan, box, kKeys, plan.list_of(box.sample, h), false,
                   [&](const Segment& s) { tile->add(s, flush); });
      tile->finish(flush);
    }
    products.finish(2);
    slots->for_runs([&](const SlotRun& r) {
      scatter_run(segment.dk, box.sample, box.head, r.tokens, s.gradient[0].at(r.slot, 0), a.scale);
      scatter_run(segment.dv, box.sample, box.head, r.tokens, s.gradient[1].at(r.slot, 0), 1);
    });
  }

 private:
  BackwardState s;
  Products products;
  const TileAttention& a;
  const TilePlan& plan;
  Slots* slots;
  OtherTile* tile;
  const int64_t H, shared, row, video_rows, all_rows;  // shared: query heads of a key/value head
  Tile stage_out;                                      // (kMostLanes, row)
  float *lse, *delta;                                  // of queries, in slots or in the tile; lse in base 2
  float* row_sum;                                      // of dS, of the box's queries
  float* mean;                                         // (row,), of keys

  float* delta_of(int64_t b, int64_t head, const TokenRun& tokens) const {
    return a.delta + (b * H + head) * all_rows + (tokens.text ? video_rows : 0) + tokens.begin;
  }

  void start(int64_t gradients) {
    products.start(gradients);
    memset(row_sum, 0, slots->units * slots->lanes * sizeof(float));
    tile->start(Products::kTile);
  }

  void load_queries(const FrameSegment& segment, const Box& box) {
    products.load_own(segment.q, box, 0);
    products.load_own(segment.dout, box, 1);
    for (int64_t i = 0; i < slots->units * slots->lanes; ++i) lse[i] = kInf, delta[i] = 0;  // exp2(0 - inf) is 0
    slots->for_runs([&](const SlotRun& r) {
      const int64_t n = r.tokens.size();
      float* kept = delta_of(box.sample, box.head, r.tokens);
      gather_run(segment.out, box.sample, box.head, r.tokens, stage_out);
      gather_run(segment.dout, box.sample, box.head, r.tokens, s.stage);
      for (int64_t i = 0; i < n; ++i) {
        const float *out = stage_out.at(i, 0).data, *dout = s.stage.at(i, 0).data;
        double total = 0;
        for (int64_t c = 0; c < s.D; ++c) total += static_cast<double>(out[c]) * dout[c];
        kept[i] = static_cast<float>(total);
      }
      if (segment.dlse)
        for_each_row(segment.dlse, box.sample, box.head, r.tokens,
                     [&](const char* at, int64_t i) { kept[i] -= *reinterpret_cast<const float*>(at); });
      memcpy(delta + r.slot, kept, n * sizeof(float));
      load_lse(segment, box.sample, box.head, r.tokens, lse + r.slot);
    });
  }

  static void load_lse(const FrameSegment& segment, int64_t b, int64_t head, TokenRun tokens, float* to) {
    for_each_row(segment.lse, b, head, tokens, [&](const char* at, int64_t i) {
      const float x = *reinterpret_cast<const float*>(at) * kLog2E;
      to[i] = x == -kInf ? kInf : x;
    });
  }

  // P and dS in place; hidden ones exactly 0. shift(j), delta(j): lse and delta of what stands in lane and row.
  template <typename Lse, typename Delta>
  VDCORE_INLINE vf weigh(const Box& box, Side side, int64_t u, int64_t lane, const Lse& shift, const Delta& less) {
    const int64_t lanes = slots->lanes;
    const float factor = products.factor();
    vf total = {};
    for (int64_t i = 0; i < s.view->part_count; ++i) {
      const UnitView::Edge& part = s.view->parts[i];
      const auto one = [&](int64_t j, vi sees, bool edge) __attribute__((always_inline)) {
        float *weight = s.p + j * lanes + lane, *gradient_of = s.ds + j * lanes + lane;
        vf x = exp2(load(weight) * factor - shift(j));
        vf dx = x * (load(gradient_of) - less(j));
        if (edge) x = select(sees, x, vf{}), dx = select(sees, dx, vf{});
        store(weight, x);
        store(gradient_of, dx);
        total += Products::rounded(dx);
      };
      if (!part.piece) {
        for (int64_t j = part.begin; j < part.end; ++j) one(j, vi{}, false);
        continue;
      }
      const LaneMask mask(plan, box, side, *slots, u, lane, *part.piece);
      for (int64_t j = part.begin; j < part.end; ++j) one(j, mask.sees(j), true);
    }
    return total;
  }

  void query_tile(const Box& box, int64_t kv_head) {
    const Tensors of[2] = {&FrameSegment::k, &FrameSegment::v};
    products.gather(of, box, kv_head, 1);
    for (int64_t u = 0; u < slots->units; ++u) {
      find_view(plan, box, kQueries, *slots, u, *tile, *s.view);
      if (!s.view->run_count) continue;
      products.scores(u);
      for (int64_t lane = 0; lane < slots->in_use(u); lane += W) {
        const int64_t slot = u * slots->lanes + lane;
        const vf shift = load(lse + slot), less = load(delta + slot);
        const vf total = weigh(
            box, kQueries, u, lane, [&](int64_t) __attribute__((always_inline)) { return shift; },
            [&](int64_t) __attribute__((always_inline)) { return less; });
        store(row_sum + slot, load(row_sum + slot) + total);
      }
      products.add(u, s.ds, 0, 0, box, kQueries, of[0], kv_head);
    }
  }

  void key_tile(const Box& box, int64_t head) {
    const Tensors of[2] = {&FrameSegment::q, &FrameSegment::dout};
    products.gather(of, box, head, 2);
    for (int64_t i = 0; i < tile->count; ++i) {
      const Piece& piece = tile->pieces[i];
      load_lse(a.segment[piece.of.tokens.text], box.sample, head, piece.of.tokens, lse + piece.at);
      memcpy(delta + piece.at, delta_of(box.sample, head, piece.of.tokens), piece.count * sizeof(float));
    }
    for (int64_t u = 0; u < slots->units; ++u) {
      find_view(plan, box, kKeys, *slots, u, *tile, *s.view);
      if (!s.view->run_count) continue;
      products.scores(u);
      for (int64_t lane = 0; lane < slots->in_use(u); lane += W)
        weigh(
            box, kKeys, u, lane, [&](int64_t j) __attribute__((always_inline)) { return splat(lse[j]); },
            [&](int64_t j) __attribute__((always_inline)) { return splat(delta[j]); });
      products.add(u, s.ds, 0, 0, box, kKeys, of[0], head);
      products.add(u, s.p, 1, 1, box, kKeys, of[1], head);
    }
  }
};

template <typename Products>
struct BackwardJob {
  const TileAttention& a;
  Boxes boxes;
  void (Backward<Products>::*pass)(const Box&, const Shape*);

  void run(int64_t i) const {
    const Box box = boxes.at(i);
    Arena count(nullptr);
    Backward<Products>(a, count);
    Arena arena(scratch(count.used()));
    Backward<Products> backward(a, arena);
    (backward.*pass)(box, box.group ? &boxes.shape(box) : nullptr);
  }
};

template <typename Products>
void run_backward(const TileAttention& a) {
  Shape* shapes = new Shape[larger(a.plan->group_count, 1)];
  const int64_t H = a.segment[0].q.size[3], G = a.segment[0].k.size[3];
  for (Side side : {kQueries, kKeys}) {
    using Job = BackwardJob<Products>;
    Job job{a,
            {*a.plan, side, side == kQueries ? H : G, side == kQueries ? 1 : H / G, shapes},
            side == kQueries ? &Backward<Products>::queries : &Backward<Products>::keys};
    parallel_for(job.boxes.items(), a.threads, [](void* p, int64_t i) { static_cast<const Job*>(p)->run(i); }, &job);
  }
  delete[] shapes;
}

}  // namespace vdcore::cpu::VDCORE_ISA
