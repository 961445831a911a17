// Attention of a grid's tokens to windows and listed tiles, forward, of bfloat16 in pairs; other dtypes as without
// them.
//
// Scores are K Q^T and results V^T P, as in frame_attention/forward_amx.cpp. Products take rows and terms in steps of
// kLeastTerms: the runs that a unit sees grow to whole steps, and what they did not hold weighs 0.
#include "cpu/tile_attention/forward.h"
#include "cpu/tile_attention/pairs_of_tiles.h"

namespace vdcore::cpu::VDCORE_REST {
void tile_attention_forward(const TileAttention&);
}

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class MatrixProducts {
 public:
  static constexpr int64_t kTile = kOtherTile;
  static constexpr bool kCenters = false;

  MatrixProducts(ForwardState& state, Arena& arena)
      : s(state), terms(whole_terms(state.D)), depth(least_terms(state.D)) {
    queries = halves(arena, kBoxTokens * terms);
    lanes_of = {halves(arena, kMostLanes * terms), terms};
    for (Rows* x : {&k, &stage}) *x = {halves(arena, kTile * terms), terms};
    v = {halves(arena, s.row * kTile), kTile};
    scores = arena.floats(kTile * kMostLanes);
    weights = halves(arena, kTile * kMostLanes);
    results = arena.floats(kBoxTokens * s.row);
  }

  void load_queries() const {
    const int64_t lanes = s.slots->lanes;
    const TensorView& q = s.a.segment[s.box.text].q;
    for_units(
        *s.slots,
        [&](int64_t slot, const TokenRun& tokens) {
          gather_rows(q, s.box.sample, s.box.head, tokens, tokens.size(), lanes_of.at(slot, 0));
        },
        [&](int64_t u) {
          memset(lanes_of.at(s.slots->filled[u], 0).data, 0, (lanes - s.slots->filled[u]) * terms * sizeof(uint16_t));
          pack_transposed(lanes, terms, lanes_of, unit(u),
                          s.a.scale < 0 ? 0x80008000u : 0u);  // so that the factor is positive
        });
    memset(results, 0, s.all_slots() * s.row * sizeof(float));
  }

  void gather() {
    const int64_t steps = whole_terms(s.tile->tokens);
    for (int64_t i = 0; i < s.tile->count; ++i) {
      const Piece& p = s.tile->pieces[i];
      const FrameSegment& from = s.a.segment[p.of.tokens.text];
      gather_rows(from.k, s.box.sample, s.kv_head, p.of.tokens, p.count, k.at(p.at, 0));
      gather_rows(from.v, s.box.sample, s.kv_head, p.of.tokens, p.count, stage.at(p.at, 0));
    }
    for (const Rows& x : {k, stage})
      memset(x.at(s.tile->tokens, 0).data, 0, (steps - s.tile->tokens) * terms * sizeof(uint16_t));
    find_strange_rows(stage, s.tile->tokens, strange);
    transpose_rows(steps, s.row, stage, v);
  }

  void attend(int64_t u) {
    const int64_t lanes = s.slots->lanes, used = s.slots->in_use(u);
    steps.find(*s.view);
    for (int64_t i = 0; i < steps.count; ++i)
      product(steps.runs[i].size(), used, depth, k.at(steps.runs[i].begin, 0), unit(u),
              {scores + steps.runs[i].begin * lanes, lanes}, false);
    const Pairs p = {weights, 2 * lanes};
    for (int64_t lane = 0; lane < used; lane += W) softmax(u, lane, p);
    add_over_steps(s.row, used, steps, v, p, result(u));
    if (strange.count)
      add_strange(s.plan, s.box, kQueries, *s.slots, u, *s.tile, *s.view, strange, s.a.segment, &FrameSegment::v,
                  s.kv_head, s.stage, [&](int64_t j, int64_t lane, int64_t c, float x) {
                    *result(u).at(c, lane).data += weight_at(p, j, lane) * x;
                  });
  }

  // Units' results, transposed into rows; maxima become scores.
  void finish() const {
    for (int64_t i = 0; i < s.all_slots(); i += W) store(s.maximum + i, load(s.maximum + i) * factor());
    for (int64_t u = 0; u < s.slots->units; ++u)
      transpose(s.row, s.slots->in_use(u), result(u), 1.f, s.out.at(u * s.slots->lanes, 0));
  }

 private:
  ForwardState& s;
  const int64_t terms, depth;
  TileScope registers;
  uint16_t* queries;  // per unit pairs (terms, lanes)
  Rows lanes_of;      // (kMostLanes, terms)
  Rows k, stage;      // (kTile, terms)
  Rows v;             // (row, kTile)
  float* scores;      // (kTile, lanes)
  uint16_t* weights;  // pairs (kTile, lanes)
  float* results;     // per unit (row, lanes)
  StrangeRows strange;
  Steps steps;

  float factor() const { return __builtin_fabsf(s.a.scale) * kLog2E; }  // from a product to a score in base 2
  Pairs unit(int64_t u) const { return {queries + u * s.slots->lanes * terms, 2 * s.slots->lanes}; }
  Tile result(int64_t u) const { return {results + u * s.slots->lanes * s.row, s.slots->lanes}; }

  // Scores of one vector of a unit become weights, in pairs of keys; hidden ones exactly 0.
  void softmax(int64_t u, int64_t lane, Pairs to) const {
    const int64_t lanes = s.slots->lanes, slot = u * lanes + lane;
    const float factor = this->factor();
    float* column = scores + lane;
    vf top = splat(-kInf);
    steps.for_parts(
        *s.view,
        [&](int64_t begin, int64_t end) {
          for (int64_t j = begin; j < end; ++j) store(column + j * lanes, splat(-kInf));
        },
        [&](const UnitView::Edge& part) {
          if (!part.piece) {
            for (int64_t j = part.begin; j < part.end; ++j) top = max(top, load(column + j * lanes));
            return;
          }
          const LaneMask mask(s.plan, s.box, kQueries, *s.slots, u, lane, *part.piece);
          for (int64_t j = part.begin; j < part.end; ++j) {
            const vf x = select(mask.sees(j), load(column + j * lanes), splat(-kInf));
            store(column + j * lanes, x);
            top = max(top, x);
          }
        });
    // Products as the base: see frame_attention/forward_amx.cpp.
    const vf before = load(s.maximum + slot), now = max(before, top);
    const vf base = select(now == -kInf, vf{}, now), rescale = exp2((before - base) * factor);
    vf even = {}, odd = {};
    for (int64_t i = 0; i < steps.count; ++i)
      for (int64_t j = steps.runs[i].begin; j < steps.runs[i].end; j += 2) {
        const vf first = exp2((load(column + j * lanes) - base) * factor);
        const vf second = exp2((load(column + (j + 1) * lanes) - base) * factor);
        even += first;
        odd += second;
        store_words(to.at(j, lane).data, pair(first, second));
      }
    store(s.maximum + slot, now);
    store(s.sum + slot, load(s.sum + slot) * rescale + (even + odd));
    float factors[W], lowest = 1;
    store(factors, rescale);
    for (float x : factors) lowest = x < lowest ? x : lowest;
    if (lowest == 1) return;
    float* result_at = result(u).at(0, lane).data;
    for (int64_t c = 0; c < s.row; ++c, result_at += lanes) store(result_at, load(result_at) * rescale);
  }
};

}  // namespace

// A factor of 0 would make NaN of what is hidden.
void tile_attention_forward(const TileAttention& a) {
  if (!in_bf16(a) || a.scale == 0) return VDCORE_REST::tile_attention_forward(a);
  QueryBoxesJob<Forward<MatrixProducts>>::run_all(a);
}

}  // namespace vdcore::cpu::VDCORE_ISA
