// Tangents of attention of a grid's tokens to windows and listed tiles, in vectors.
#include "cpu/tile_attention/tangents.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class VectorProducts {
 public:
  static constexpr int64_t kTile = kOtherTile / 2;

  VectorProducts(TileTangentsState& state, Arena& arena) : s(state) {
    for (float** x : {&q, &dq}) *x = arena.floats(kBoxTokens * s.row);
    for (Tile* x : {&k, &dk, &v, &dv}) *x = {arena.floats(kTile * s.row), s.row};
    for (float** x : {&weights, &moved}) *x = arena.floats(kTile * kMostLanes);
  }

  void load_queries() const {
    const FrameSegment& segment = s.a.segment[s.box.text];
    load_queries(segment.q, q);
    if (segment.dq) load_queries(segment.dq, dq);
  }

  void gather() {
    for (int64_t i = 0; i < s.tile->count; ++i) {
      const Piece& p = s.tile->pieces[i];
      const FrameSegment& from = s.of(p.of.tokens);
      gather_run(from.k, s.box.sample, s.kv_head, p.of.tokens, k.at(p.at, 0));
      if (from.dk) gather_run(from.dk, s.box.sample, s.kv_head, p.of.tokens, dk.at(p.at, 0));
      if (s.moves) gather_run(from.v, s.box.sample, s.kv_head, p.of.tokens, v.at(p.at, 0));
      if (from.dv) gather_run(from.dv, s.box.sample, s.kv_head, p.of.tokens, dv.at(p.at, 0));
    }
    if (s.moves) take_out(v, strange);
    if (s.a.segment[0].dv) take_out(dv, strange_moves);
  }

  void attend(int64_t u) const {
    NoPrefetch none;
    const FrameSegment& of = s.a.segment[0];
    const int64_t lanes = s.slots->lanes, used = s.slots->in_use(u), filled = s.slots->filled[u], first = u * lanes;
    const Tile p = {weights, lanes}, e = {moved, lanes}, to = s.out.at(first, 0);
    const Tile queries = {q + first * s.row, lanes}, moved_queries = {dq + first * s.row, lanes};
    for (int64_t i = 0; i < s.view->run_count; ++i) {
      const Run& r = s.view->runs[i];
      const Scalars keys = {k.at(r.begin, 0).data, s.row, 1}, moved_keys = {dk.at(r.begin, 0).data, s.row, 1};
      score_product(r.size(), used, s.D, keys, queries, p.at(r.begin, 0), none);
      if (of.dq) score_product(r.size(), used, s.D, keys, moved_queries, e.at(r.begin, 0), none);
      if (of.dk) product(r.size(), used, s.D, moved_keys, queries, e.at(r.begin, 0), static_cast<bool>(of.dq), none);
    }
    for (int64_t lane = 0; lane < used; lane += W) weigh(u, lane);
    for (int64_t i = 0; i < s.view->run_count; ++i) {
      const Run& r = s.view->runs[i];
      if (s.moves)
        product(filled, s.row, r.size(), {e.at(r.begin, 0).data, 1, lanes}, v.at(r.begin, 0), to, true, none);
      if (of.dv) product(filled, s.row, r.size(), {p.at(r.begin, 0).data, 1, lanes}, dv.at(r.begin, 0), to, true, none);
    }
    add_strange_rows(u, strange, &FrameSegment::v, e);
    add_strange_rows(u, strange_moves, &FrameSegment::dv, p);
  }

  void finish() const {}

 private:
  TileTangentsState& s;
  float *q, *dq;           // per unit (row, lanes): transposed, times scale and log2(e)
  Tile k, dk, v, dv;       // (kTile, row)
  float *weights, *moved;  // (kTile, lanes): scores and their tangents, then P and P (E - shift)
  StrangeRows strange, strange_moves;

  void load_queries(const TensorView& x, float* to) const {
    const int64_t lanes = s.slots->lanes;
    for_units(
        *s.slots,
        [&](int64_t slot, const TokenRun& tokens) {
          gather_run(x, s.box.sample, s.box.head, tokens, s.stage.at(slot, 0));
        },
        [&](int64_t u) {
          transpose(s.slots->filled[u], s.D, s.stage, s.a.scale * kLog2E, {to + u * lanes * s.row, lanes});
        });
  }

  void take_out(Tile values, StrangeRows& rows) const {
    rows.find(values, s.tile->tokens);
    rows.take_out(values);
  }
  void add_strange_rows(int64_t u, const StrangeRows& rows, TensorView FrameSegment::* of, Tile by) const {
    const Tile to = s.out.at(u * s.slots->lanes, 0);
    if (rows.count)
      add_strange(
          s.plan, s.box, kQueries, *s.slots, u, *s.tile, *s.view, rows, s.a.segment, of, s.kv_head, s.stage,
          [&](int64_t j, int64_t lane, int64_t c, float x) { *to.at(lane, c).data += *by.at(j, lane).data * x; });
  }

  // Scores of one vector of a unit become P, their tangents P (E - shift).
  void weigh(int64_t u, int64_t lane) const {
    const int64_t lanes = s.slots->lanes, slot = u * lanes + lane;
    float *score = weights + lane, *tangent = moved + lane;
    s.open(u, lane, score, tangent, kLn2);
    const vf lse = load(s.lse + slot), shift = load(s.shift + slot);
    KeySum sum;
    for (int64_t i = 0; i < s.view->run_count; ++i)
      for (int64_t j = s.view->runs[i].begin; j < s.view->runs[i].end; ++j) {
        const vf p = exp2(load(score + j * lanes) - lse);
        store(score + j * lanes, p);
        if (!s.moves) continue;
        const vf term = p * (load(tangent + j * lanes) * kLn2 - shift);
        store(tangent + j * lanes, term);
        sum.add(j, term);
      }
    sum.flush();
    for (float* x : {s.sum + slot, s.sum_of_terms + slot}) store(x, load(x) + sum.total);
  }
};

}  // namespace

void tile_attention_tangents(const TileAttention& a) { QueryBoxesJob<TileTangents<VectorProducts>>::run_all(a); }

}  // namespace vdcore::cpu::VDCORE_ISA
