// Tangents of attention of a grid's tokens to windows and listed tiles, of bfloat16 in pairs; other dtypes as without
// them. Products as in forward_amx.cpp: scores and their tangents are K Q^T, K dQ^T and dK Q^T, results V^T (P E) and
// dV^T P.
#include "cpu/tile_attention/pairs_of_tiles.h"
#include "cpu/tile_attention/tangents.h"

namespace vdcore::cpu::VDCORE_REST {
void tile_attention_tangents(const TileAttention&);
}

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class MatrixProducts {
 public:
  static constexpr int64_t kTile = kOtherTile;

  MatrixProducts(TileTangentsState& state, Arena& arena)
      : s(state), terms(whole_terms(state.D)), depth(least_terms(state.D)) {
    for (uint16_t** x : {&q, &dq}) *x = halves(arena, kBoxTokens * terms);
    lanes_of = {halves(arena, kMostLanes * terms), terms};
    for (Rows* x : {&k, &dk, &stage}) *x = {halves(arena, kTile * terms), terms};
    for (Rows* x : {&v, &dv}) *x = {halves(arena, s.row * kTile), kTile};
    for (float** x : {&scores, &tangents}) *x = arena.floats(kTile * kMostLanes);
    for (uint16_t** x : {&weights, &moved}) *x = halves(arena, kTile * kMostLanes);
    results = arena.floats(kBoxTokens * s.row);
  }

  void load_queries() const {
    const FrameSegment& segment = s.a.segment[s.box.text];
    load_queries(segment.q, q);
    if (segment.dq) load_queries(segment.dq, dq);
    memset(results, 0, s.all_slots() * s.row * sizeof(float));
  }

  void gather() {
    const FrameSegment& of = s.a.segment[0];
    gather_keys(&FrameSegment::k, k);
    if (of.dk) gather_keys(&FrameSegment::dk, dk);
    if (s.moves) gather_values(&FrameSegment::v, v, strange);
    if (of.dv) gather_values(&FrameSegment::dv, dv, strange_moves);
  }

  void attend(int64_t u) {
    const FrameSegment& of = s.a.segment[0];
    const int64_t lanes = s.slots->lanes, used = s.slots->in_use(u);
    steps.find(*s.view);
    for (int64_t i = 0; i < steps.count; ++i) {
      const Run& r = steps.runs[i];
      const Tile e = {tangents + r.begin * lanes, lanes};
      product(r.size(), used, depth, k.at(r.begin, 0), unit(q, u), {scores + r.begin * lanes, lanes}, false);
      if (of.dq) product(r.size(), used, depth, k.at(r.begin, 0), unit(dq, u), e, false);
      if (of.dk) product(r.size(), used, depth, dk.at(r.begin, 0), unit(q, u), e, static_cast<bool>(of.dq));
    }
    for (int64_t lane = 0; lane < used; lane += W) weigh(u, lane);
    if (s.moves) add(u, v, moved, strange, &FrameSegment::v);
    if (of.dv) add(u, dv, weights, strange_moves, &FrameSegment::dv);
  }

  // Units' results, transposed into rows.
  void finish() const {
    for (int64_t u = 0; u < s.slots->units; ++u)
      transpose(s.row, s.slots->in_use(u), result(u), 1.f, s.out.at(u * s.slots->lanes, 0));
  }

 private:
  TileTangentsState& s;
  const int64_t terms, depth;
  TileScope registers;
  uint16_t *q, *dq;           // per unit pairs (terms, lanes)
  Rows lanes_of;              // (kMostLanes, terms)
  Rows k, dk, stage;          // (kTile, terms)
  Rows v, dv;                 // (row, kTile)
  float *scores, *tangents;   // (kTile, lanes)
  uint16_t *weights, *moved;  // pairs (kTile, lanes): P and P (E - shift)
  float* results;             // per unit (row, lanes)
  StrangeRows strange, strange_moves;
  Steps steps;

  Pairs unit(uint16_t* of, int64_t u) const { return {of + u * s.slots->lanes * terms, 2 * s.slots->lanes}; }
  Tile result(int64_t u) const { return {results + u * s.slots->lanes * s.row, s.slots->lanes}; }

  void load_queries(const TensorView& x, uint16_t* to) const {
    const int64_t lanes = s.slots->lanes;
    for_units(
        *s.slots,
        [&](int64_t slot, const TokenRun& tokens) {
          gather_rows(x, s.box.sample, s.box.head, tokens, tokens.size(), lanes_of.at(slot, 0));
        },
        [&](int64_t u) {
          memset(lanes_of.at(s.slots->filled[u], 0).data, 0, (lanes - s.slots->filled[u]) * terms * sizeof(uint16_t));
          pack_transposed(lanes, terms, lanes_of, unit(to, u),
                          s.a.scale < 0 ? 0x80008000u : 0u);  // so that the factor is positive
        });
  }

  void gather_keys(TensorView FrameSegment::* of, Rows to) const {
    for (int64_t i = 0; i < s.tile->count; ++i) {
      const Piece& p = s.tile->pieces[i];
      gather_rows(s.of(p.of.tokens).*of, s.box.sample, s.kv_head, p.of.tokens, p.count, to.at(p.at, 0));
    }
    const int64_t tokens = s.tile->tokens;
    memset(to.at(tokens, 0).data, 0, (whole_terms(tokens) - tokens) * terms * sizeof(uint16_t));
  }
  void gather_values(TensorView FrameSegment::* of, Rows to, StrangeRows& rows) const {
    gather_keys(of, stage);
    find_strange_rows(stage, s.tile->tokens, rows);
    transpose_rows(whole_terms(s.tile->tokens), s.row, stage, to);
  }

  void add(int64_t u, Rows values, uint16_t* by, const StrangeRows& rows, TensorView FrameSegment::* of) const {
    const Pairs p = {by, 2 * s.slots->lanes};
    add_over_steps(s.row, s.slots->in_use(u), steps, values, p, result(u));
    if (rows.count)
      add_strange(s.plan, s.box, kQueries, *s.slots, u, *s.tile, *s.view, rows, s.a.segment, of, s.kv_head, s.stage,
                  [&](int64_t j, int64_t lane, int64_t c, float x) {
                    *result(u).at(c, lane).data += weight_at(p, j, lane) * x;
                  });
  }

  // Scores of one vector of a unit become P, their tangents P (E - shift), in pairs of keys; hidden ones exactly 0.
  void weigh(int64_t u, int64_t lane) const {
    const int64_t lanes = s.slots->lanes, slot = u * lanes + lane;
    const float factor = __builtin_fabsf(s.a.scale);
    float *score = scores + lane, *tangent = tangents + lane;
    steps.for_parts(
        *s.view,
        [&](int64_t begin, int64_t end) {
          for (int64_t j = begin; j < end; ++j) {
            store(score + j * lanes, splat(-kInf));
            store(tangent + j * lanes, vf{});
          }
        },
        [](const UnitView::Edge&) {});
    s.open(u, lane, score, tangent, factor);
    const vf lse = load(s.lse + slot), shift = load(s.shift + slot);
    const Pairs p = {weights + 2 * lane, 2 * lanes}, pe = {moved + 2 * lane, 2 * lanes};
    vf sum = {}, sum_of_terms = {};
    for (int64_t i = 0; i < steps.count; ++i)
      for (int64_t j = steps.runs[i].begin; j < steps.runs[i].end; j += 2) {
        const vf first = exp2(load(score + j * lanes) * (factor * kLog2E) - lse);
        const vf second = exp2(load(score + (j + 1) * lanes) * (factor * kLog2E) - lse);
        store_words(p.at(j, 0).data, pair(first, second));
        if (!s.moves) continue;
        const vf a = first * (load(tangent + j * lanes) * factor - shift);
        const vf b = second * (load(tangent + (j + 1) * lanes) * factor - shift);
        store_words(pe.at(j, 0).data, pair(a, b));
        sum += a + b;
        sum_of_terms += as_bf16(a) + as_bf16(b);
      }
    store(s.sum + slot, load(s.sum + slot) + sum);
    store(s.sum_of_terms + slot, load(s.sum_of_terms + slot) + sum_of_terms);
  }
};

}  // namespace

// A factor of 0 would make NaN of what is hidden.
void tile_attention_tangents(const TileAttention& a) {
  if (!in_bf16(a) || a.scale == 0) return VDCORE_REST::tile_attention_tangents(a);
  QueryBoxesJob<TileTangents<MatrixProducts>>::run_all(a);
}

}  // namespace vdcore::cpu::VDCORE_ISA
