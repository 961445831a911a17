// Attention of a grid's tokens to windows and listed tiles, backward, of bfloat16 in pairs; other dtypes as without
// them. dout may be float32, and is rounded.
//
// Weights are made in vectors, as without pairs, and rounded then; gradients are T^T W with T the other side's tokens,
// transposed once for all units of the box, and W their weights in pairs of tokens.
#include "cpu/tile_attention/backward.h"
#include "cpu/tile_attention/pairs_of_tiles.h"

namespace vdcore::cpu::VDCORE_REST {
void tile_attention_backward(const TileAttention&);
}

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class MatrixProducts {
 public:
  static constexpr int64_t kTile = kOtherTile;

  MatrixProducts(BackwardState& state, Arena& arena)
      : s(state), terms(whole_terms(state.D)), depth(least_terms(state.D)) {
    for (uint16_t** x : {&own[0], &own[1]}) *x = halves(arena, kBoxTokens * terms);
    lanes_of = {halves(arena, kMostLanes * terms), terms};
    for (Rows* x : {&other[0], &other[1], &stage}) *x = {halves(arena, kTile * terms), terms};
    for (Rows* x : {&transposed[0], &transposed[1]}) *x = {halves(arena, s.row * kTile), kTile};
    pairs = halves(arena, kTile * kMostLanes);
    for (float** x : {&results[0], &results[1]}) *x = arena.floats(kBoxTokens * s.row);
  }

  VDCORE_INLINE float factor() const { return __builtin_fabsf(s.a.scale) * kLog2E; }
  static VDCORE_INLINE vf rounded(vf x) { return as_bf16(x); }

  void load_own(const TensorView& x, const Box& box, int64_t which) const {
    const int64_t lanes = s.slots->lanes;
    const auto gather = [&](int64_t slot, const TokenRun& tokens) {
      gather_rows(x, box.sample, box.head, tokens, tokens.size(), lanes_of.at(slot, 0));
    };
    for_units(*s.slots, gather, [&](int64_t u) {
      memset(lanes_of.at(s.slots->filled[u], 0).data, 0, (lanes - s.slots->filled[u]) * terms * sizeof(uint16_t));
      pack_transposed(lanes, terms, lanes_of, unit(which, u), !which && s.a.scale < 0 ? 0x80008000u : 0u);
    });
  }

  void start(int64_t gradients) const {
    for (int64_t i = 0; i < gradients; ++i)
      memset(results[i], 0, s.slots->units * s.slots->lanes * s.row * sizeof(float));
  }

  void gather(const Tensors* of, const Box& box, int64_t head, int64_t gradients) {
    const int64_t tokens = s.tile->tokens, steps = whole_terms(tokens);
    for (int64_t x = 0; x < 2; ++x) {
      for (int64_t i = 0; i < s.tile->count; ++i) {
        const Piece& p = s.tile->pieces[i];
        gather_rows(s.a.segment[p.of.tokens.text].*of[x], box.sample, head, p.of.tokens, p.count, other[x].at(p.at, 0));
      }
      memset(other[x].at(tokens, 0).data, 0, (steps - tokens) * terms * sizeof(uint16_t));
      if (x >= gradients) continue;
      memcpy(stage.data, other[x].data, steps * terms * sizeof(uint16_t));
      find_strange_rows(stage, tokens, strange[x]);
      transpose_rows(steps, s.row, stage, transposed[x]);
    }
  }

  void scores(int64_t u) {
    const int64_t lanes = s.slots->lanes, used = s.slots->in_use(u);
    steps.find(*s.view);
    for (int64_t i = 0; i < steps.count; ++i)
      for (int64_t x = 0; x < 2; ++x) {
        const Run& r = steps.runs[i];
        product(r.size(), used, depth, other[x].at(r.begin, 0), unit(x, u), {(x ? s.ds : s.p) + r.begin * lanes, lanes},
                false);
      }
  }

  void add(int64_t u, float* weights, int64_t which, int64_t gradient, const Box& box, Side side, Tensors of,
           int64_t head) const {
    const int64_t lanes = s.slots->lanes, used = s.slots->in_use(u);
    const Pairs w = {pairs, 2 * lanes};
    const Tile to = result(gradient, u);
    for (int64_t lane = 0; lane < used; lane += W) {
      float* column = weights + lane;
      steps.for_parts(
          *s.view,
          [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; ++j) store(column + j * lanes, vf{});
          },
          [](const UnitView::Edge&) {});
      for (int64_t i = 0; i < steps.count; ++i)
        for (int64_t j = steps.runs[i].begin; j < steps.runs[i].end; j += 2)
          store_words(w.at(j, lane).data, pair(load(column + j * lanes), load(column + (j + 1) * lanes)));
    }
    add_over_steps(s.row, used, steps, transposed[which], w, to);
    if (strange[which].count)
      add_strange(
          s.plan, box, side, *s.slots, u, *s.tile, *s.view, strange[which], s.a.segment, of, head, s.stage,
          [&](int64_t j, int64_t lane, int64_t c, float x) { *to.at(c, lane).data += weight_at(w, j, lane) * x; });
  }

  void finish(int64_t gradients) const {
    for (int64_t i = 0; i < gradients; ++i)
      for (int64_t u = 0; u < s.slots->units; ++u)
        transpose(s.row, s.slots->in_use(u), result(i, u), 1.f, s.gradient[i].at(u * s.slots->lanes, 0));
  }

 private:
  BackwardState& s;
  const int64_t terms, depth;
  TileScope registers;
  uint16_t* own[2];      // per unit pairs (terms, lanes): q and dout, or k and v
  Rows lanes_of;         // (kMostLanes, terms)
  Rows other[2], stage;  // (kTile, terms): k and v, or q and dout
  Rows transposed[2];    // (row, kTile)
  uint16_t* pairs;       // (kTile, lanes), of weights
  float* results[2];     // per unit (row, lanes)
  StrangeRows strange[2];
  Steps steps;

  Pairs unit(int64_t which, int64_t u) const { return {own[which] + u * s.slots->lanes * terms, 2 * s.slots->lanes}; }
  Tile result(int64_t i, int64_t u) const { return {results[i] + u * s.slots->lanes * s.row, s.slots->lanes}; }
};

}  // namespace

void tile_attention_backward(const TileAttention& a) {
  if (!in_bf16(a)) return VDCORE_REST::tile_attention_backward(a);
  run_backward<MatrixProducts>(a);
}

}  // namespace vdcore::cpu::VDCORE_ISA
