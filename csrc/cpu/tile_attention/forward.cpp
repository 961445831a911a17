// Attention of a grid's tokens to windows and listed tiles, forward, in vectors.
#include "cpu/tile_attention/forward.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class VectorProducts {
 public:
  static constexpr int64_t kTile = kOtherTile / 2;
  static constexpr bool kCenters = true;

  VectorProducts(ForwardState& state, Arena& arena) : s(state) {
    queries = arena.floats(kBoxTokens * s.row);
    for (Tile* x : {&k, &v}) *x = {arena.floats(kTile * s.row), s.row};
    scores = arena.floats(kTile * kMostLanes);
  }

  void load_queries() const {
    const int64_t lanes = s.slots->lanes;
    for_units(
        *s.slots,
        [&](int64_t slot, const TokenRun& tokens) {
          gather_run(s.a.segment[s.box.text].q, s.box.sample, s.box.head, tokens, s.stage.at(slot, 0));
        },
        [&](int64_t u) {
          transpose(s.slots->filled[u], s.D, s.stage, s.a.scale * kLog2E, {queries + u * lanes * s.row, lanes});
        });
  }

  void gather() {
    for (int64_t i = 0; i < s.tile->count; ++i) {
      const Piece& p = s.tile->pieces[i];
      const FrameSegment& from = s.a.segment[p.of.tokens.text];
      gather_run(from.k, s.box.sample, s.kv_head, p.of.tokens, k.at(p.at, 0));
      gather_run(from.v, s.box.sample, s.kv_head, p.of.tokens, v.at(p.at, 0));
    }
    strange.find(v, s.tile->tokens);
    if (s.a.segment[0].v.dtype == DType::f32)
      for (int64_t j = 0; j < s.tile->tokens; ++j)
        for (int64_t c = 0; c < s.row; c += W) {
          float* at = v.at(j, c).data;
          store(at, load(at) - load(s.center + c));
        }
    strange.take_out(v);
  }

  void attend(int64_t u) const {
    NoPrefetch none;
    const int64_t lanes = s.slots->lanes, used = s.slots->in_use(u), first = u * lanes;
    const Tile weights = {scores, lanes}, q = {queries + first * s.row, lanes}, to = s.out.at(first, 0);
    for (int64_t i = 0; i < s.view->run_count; ++i) {
      const Run& r = s.view->runs[i];
      score_product(r.size(), used, s.D, {k.at(r.begin, 0).data, s.row, 1}, q, weights.at(r.begin, 0), none);
    }
    for (int64_t lane = 0; lane < used; lane += W) softmax(first, lane, smaller(W, s.slots->filled[u] - lane));
    for (int64_t i = 0; i < s.view->run_count; ++i) {
      const Run& r = s.view->runs[i];
      product(s.slots->filled[u], s.row, r.size(), {weights.at(r.begin, 0).data, 1, lanes}, v.at(r.begin, 0), to, true,
              none);
    }
    if (strange.count)
      add_strange(s.plan, s.box, kQueries, *s.slots, u, *s.tile, *s.view, strange, s.a.segment, &FrameSegment::v,
                  s.kv_head, s.stage, [&](int64_t j, int64_t lane, int64_t c, float x) {
                    *to.at(lane, c).data += *weights.at(j, lane).data * (x - s.center[c]);
                  });
  }

  void finish() const {}

 private:
  ForwardState& s;
  float* queries;  // per unit (row, lanes): transposed, times scale and log2(e)
  Tile k, v;       // (kTile, row)
  float* scores;   // (kTile, lanes)
  StrangeRows strange;

  // Scores of one vector of a unit become exp2(score - maximum), in place; hidden ones exactly 0.
  void softmax(int64_t first, int64_t lane, int64_t rows) const {
    const int64_t lanes = s.slots->lanes;
    float* column = scores + lane;
    const vf before = load(s.maximum + first + lane);
    vf top = before;
    for (int64_t i = 0; i < s.view->part_count; ++i) {
      const UnitView::Edge& part = s.view->parts[i];
      if (!part.piece) {
        for (int64_t j = part.begin; j < part.end; ++j) top = max(top, load(column + j * lanes));
        continue;
      }
      const LaneMask mask(s.plan, s.box, kQueries, *s.slots, first / lanes, lane, *part.piece);
      for (int64_t j = part.begin; j < part.end; ++j) {
        const vf x = select(mask.sees(j), load(column + j * lanes), splat(-kInf));
        store(column + j * lanes, x);
        top = max(top, x);
      }
    }
    const vf base = select(top == -kInf, vf{}, top);  // all scores -inf: exp2(-inf - 0) is 0, not NaN
    const vf factor = exp2(before - base);
    vf total = {};
    for (int64_t i = 0; i < s.view->run_count; ++i)
      for (int64_t j = s.view->runs[i].begin; j < s.view->runs[i].end; ++j) {
        const vf p = exp2(load(column + j * lanes) - base);
        total += p;
        store(column + j * lanes, p);
      }
    store(s.maximum + first + lane, top);
    store(s.sum + first + lane, load(s.sum + first + lane) * factor + total);
    float factors[W];
    store(factors, factor);
    for (int64_t i = 0; i < rows; ++i) {
      if (factors[i] == 1.f) continue;
      float* at = s.out.at(first + lane + i, 0).data;
      for (int64_t c = 0; c < s.row; c += W) store(at + c, load(at + c) * factors[i]);
    }
  }
};

}  // namespace

void tile_attention_forward(const TileAttention& a) { QueryBoxesJob<Forward<VectorProducts>>::run_all(a); }

}  // namespace vdcore::cpu::VDCORE_ISA
