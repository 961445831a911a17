// Attention of a grid's tokens to windows and listed tiles, backward, in vectors.
#include "cpu/tile_attention/backward.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class VectorProducts {
 public:
  static constexpr int64_t kTile = kOtherTile / 2;

  VectorProducts(BackwardState& state, Arena& arena) : s(state) {
    for (float** x : {&own[0], &own[1]}) *x = arena.floats(kBoxTokens * s.row);
    for (Tile* x : {&other[0], &other[1]}) *x = {arena.floats(kTile * s.row), s.row};
  }

  static VDCORE_INLINE float factor() { return 1; }
  static VDCORE_INLINE vf rounded(vf x) { return x; }

  void load_own(const TensorView& x, const Box& box, int64_t which) const {
    const int64_t lanes = s.slots->lanes;
    const auto gather = [&](int64_t slot, const TokenRun& tokens) {
      gather_run(x, box.sample, box.head, tokens, s.stage.at(slot, 0));
    };
    for_units(*s.slots, gather, [&](int64_t u) {
      transpose(s.slots->filled[u], s.D, s.stage, which ? 1.f : s.a.scale * kLog2E,
                {own[which] + u * lanes * s.row, lanes});
    });
  }

  void start(int64_t gradients) const {
    for (int64_t i = 0; i < gradients; ++i)
      memset(s.gradient[i].data, 0, s.slots->units * s.slots->lanes * s.row * sizeof(float));
  }

  void gather(const Tensors* of, const Box& box, int64_t head, int64_t gradients) {
    for (int64_t x = 0; x < 2; ++x) {
      for (int64_t i = 0; i < s.tile->count; ++i) {
        const Piece& p = s.tile->pieces[i];
        gather_run(s.a.segment[p.of.tokens.text].*of[x], box.sample, head, p.of.tokens, other[x].at(p.at, 0));
      }
      if (x < gradients) strange[x].find(other[x], s.tile->tokens);
    }
  }

  void scores(int64_t u) const {
    NoPrefetch none;
    const int64_t lanes = s.slots->lanes, used = s.slots->in_use(u);
    for (int64_t i = 0; i < s.view->run_count; ++i) {
      const Run& r = s.view->runs[i];
      for (int64_t x = 0; x < 2; ++x)
        score_product(r.size(), used, s.D, {other[x].at(r.begin, 0).data, s.row, 1},
                      {own[x] + u * lanes * s.row, lanes}, {(x ? s.ds : s.p) + r.begin * lanes, lanes}, none);
    }
  }

  void add(int64_t u, const float* weights, int64_t which, int64_t gradient, const Box& box, Side side, Tensors of,
           int64_t head) const {
    NoPrefetch none;
    const int64_t lanes = s.slots->lanes;
    const Tile to = s.gradient[gradient].at(u * lanes, 0);
    strange[which].take_out(other[which]);
    for (int64_t i = 0; i < s.view->run_count; ++i) {
      const Run& r = s.view->runs[i];
      product(s.slots->filled[u], s.row, r.size(), {weights + r.begin * lanes, 1, lanes}, other[which].at(r.begin, 0),
              to, true, none);
    }
    if (!strange[which].count) return;
    add_strange(
        s.plan, box, side, *s.slots, u, *s.tile, *s.view, strange[which], s.a.segment, of, head, s.stage,
        [&](int64_t j, int64_t lane, int64_t c, float x) { *to.at(lane, c).data += weights[j * lanes + lane] * x; });
    for (int64_t i = 0; i < strange[which].count; ++i) {  // back for the scores of the next unit
      const Piece* from;
      const int64_t j = strange[which].rows[i], offset = token_of(*s.tile, j, from);
      gather_run(s.a.segment[from->of.tokens.text].*of, box.sample, head, piece(from->of.tokens, offset, 1),
                 other[which].at(j, 0));
    }
  }

  void finish(int64_t) const {}

 private:
  BackwardState& s;
  float* own[2];  // per unit (row, lanes): q and dout, or k and v, transposed
  Tile other[2];  // (kTile, row): k and v, or q and dout
  StrangeRows strange[2];
};

}  // namespace

void tile_attention_backward(const TileAttention& a) { run_backward<VectorProducts>(a); }

}  // namespace vdcore::cpu::VDCORE_ISA
