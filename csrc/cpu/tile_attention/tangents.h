// Tangents of attention of a grid's tokens to windows and listed tiles, by the formula of frame attention's
// (frame_attention/tangents_of_tiles.h), over the boxes and tiles of forward (forward.h): P comes from forward's lse,
// so that one pass over the keys is enough, and every row's E is taken less its mean over the first tile that it sees.
//
// `Products` is how a unit meets a tile: in vectors, or in pairs of bfloat16.
#pragma once

#include "cpu/tile_attention/job.h"
#include "cpu/tile_attention/strange.h"

namespace vdcore::cpu::VDCORE_ISA {

// What a box has while it sees the keys.
struct TileTangentsState {
  const TileAttention& a;
  const TilePlan& plan;
  const int64_t D, row;
  const bool moves;  // the scores have a tangent
  Box box;
  int64_t kv_head = 0;
  Slots* slots;
  UnitView* view;
  OtherTile* tile;
  Tile out;                   // (kBoxTokens, row): sums of P (E - shift) v + P dv
  Tile stage;                 // (kMostLanes, row)
  float *lse, *shift;         // of slots; lse in base 2
  float* counted;             // keys that a slot has seen
  float *sum, *sum_of_terms;  // of P (E - shift), exactly and as products round its terms

  TileTangentsState(const TileAttention& args, Arena& arena)
      : a(args),
        plan(*args.plan),
        D(args.segment[0].q.size[4]),
        row(round_up(D)),
        moves(args.segment[0].dq || args.segment[0].dk) {
    slots = reinterpret_cast<Slots*>(arena.floats((sizeof(Slots) + 3) / 4));
    view = reinterpret_cast<UnitView*>(arena.floats((sizeof(UnitView) + 3) / 4));
    tile = reinterpret_cast<OtherTile*>(arena.floats((sizeof(OtherTile) + 3) / 4));
    out = {arena.floats(kBoxTokens * row), row};
    stage = {arena.floats(kMostLanes * row), row};
    for (float** x : {&lse, &shift, &counted, &sum, &sum_of_terms}) *x = arena.floats(kBoxTokens);
  }

  VDCORE_INLINE int64_t all_slots() const { return slots->units * slots->lanes; }
  const FrameSegment& of(const TokenRun& tokens) const { return a.segment[tokens.text]; }

  // ---- One vector of a unit, whose scores and their tangents are columns of tiles `lanes` wide ----

  // Hides what not everybody sees of the unit's view: scores -inf, tangents 0. Finds the shift of slots for which these
  // keys are the first: the mean of their tangents, times `factor`.
  VDCORE_INLINE void open(int64_t u, int64_t lane, float* score, float* tangent, float factor) const {
    const int64_t lanes = slots->lanes, slot = u * lanes + lane;
    vf total = {}, count = {};
    for (int64_t i = 0; i < view->part_count; ++i) {
      const UnitView::Edge& part = view->parts[i];
      if (!part.piece) {
        for (int64_t j = part.begin; j < part.end && moves; ++j) total += load(tangent + j * lanes);
        count += static_cast<float>(part.end - part.begin);
        continue;
      }
      const LaneMask mask(plan, box, kQueries, *slots, u, lane, *part.piece);
      for (int64_t j = part.begin; j < part.end; ++j) {
        const vi sees = mask.sees(j);
        store(score + j * lanes, select(sees, load(score + j * lanes), splat(-kInf)));
        count += select(sees, splat(1.f), vf{});
        if (!moves) continue;
        const vf e = select(sees, load(tangent + j * lanes), vf{});
        store(tangent + j * lanes, e);
        total += e;
      }
    }
    const vf before = load(counted + slot);
    store(counted + slot, before + count);
    store(shift + slot, select(before == 0.f, total * factor / max(count, splat(1.f)), load(shift + slot)));
  }
};

// A Products has
//   Products(TileTangentsState&, arena)
//   kTile: keys that it takes at once
//   load_queries(), gather(): what the tile holds, attend(unit), whose view has been found; finish(): out is complete
template <typename Products>
class TileTangents {
 public:
  TileTangents(const TileAttention& a, Arena& arena) : s(a, arena), products(s, arena) {}

  void run(const Box& box, const Shape* shape) {
    const FrameSegment& segment = s.a.segment[box.text];
    s.box = box;
    s.kv_head = box.head / (segment.q.size[3] / segment.k.size[3]);
    find_slots(s.plan, box, kQueries, shape, *s.slots);
    for_dead(s.plan, box, kQueries, [&](const TokenRun& tokens) { clear(tokens); });
    if (!s.slots->run_count) return;
    products.load_queries();
    load_lse(segment);
    memset(s.out.data, 0, s.all_slots() * s.row * sizeof(float));
    s.tile->start(Products::kTile);
    const auto flush = [&] {
      products.gather();
      for (int64_t u = 0; u < s.slots->units; ++u) {
        find_view(s.plan, box, kQueries, *s.slots, u, *s.tile, *s.view);
        if (s.view->run_count) products.attend(u);
      }
    };
    for_segments(s.plan, box, kQueries, s.plan.list_of(box.sample, box.head), false,
                 [&](const Segment& segment) { s.tile->add(segment, flush); });
    s.tile->finish(flush);
    products.finish();
    finish(segment);
  }

 private:
  TileTangentsState s;
  Products products;

  void load_lse(const FrameSegment& segment) const {
    for (float* x : {s.lse, s.shift, s.counted, s.sum, s.sum_of_terms}) memset(x, 0, s.all_slots() * sizeof(float));
    s.slots->for_runs([&](const SlotRun& r) {
      for_each_row(segment.lse, s.box.sample, s.box.head, r.tokens, [&](const char* at, int64_t i) {
        const float lse = *reinterpret_cast<const float*>(at);
        if (lse != -kInf) s.lse[r.slot + i] = lse * kLog2E;  // else 0: exp2(-inf - 0) is 0, not NaN
      });
    });
  }

  // dout, less what forward's result has of it, and dlse.
  void finish(const FrameSegment& segment) const {
    s.slots->for_runs([&](const SlotRun& r) {
      for (int64_t i = 0; i < r.tokens.size() && s.moves; ++i) {
        gather_run(segment.out, s.box.sample, s.box.head, piece(r.tokens, i, 1), s.stage);
        const vf sum = splat(s.sum_of_terms[r.slot + i]);
        float* at = s.out.at(r.slot + i, 0).data;
        for (int64_t c = 0; c < s.row; c += W) store(at + c, load(at + c) - sum * load(s.stage.data + c));
      }
      scatter_run(segment.dout, s.box.sample, s.box.head, r.tokens, s.out.at(r.slot, 0), 1);
      for_each_row(segment.dlse, s.box.sample, s.box.head, r.tokens, [&](char* at, int64_t i) {
        *reinterpret_cast<float*>(at) = s.sum[r.slot + i] + s.shift[r.slot + i];
      });
    });
  }

  // Of tokens that take no part.
  void clear(TokenRun tokens) const {
    const FrameSegment& segment = s.a.segment[tokens.text];
    clear_run(segment.dout, s.box.sample, s.box.head, tokens);
    for_each_row(segment.dlse, s.box.sample, s.box.head, tokens,
                 [&](char* at, int64_t) { *reinterpret_cast<float*>(at) = 0; });
  }
};

}  // namespace vdcore::cpu::VDCORE_ISA
