// Tangents of frame attention, of bfloat16 in AMX's tiles; other dtypes as without them.
//
// As forward (forward_amx.cpp): scores and their tangents are K Q^T, K dQ^T and dK Q^T, results V^T (P E) and dV^T P,
// with P and P E rounded to pairs of keys. What the rounding adds to the sum of a row of P E is taken out of dout with
// it, so that the mean of the values cancels; where all keys are in one tile, the values go without their mean.
#include "cpu/frame_attention/amx_rows.h"
#include "cpu/frame_attention/tangents_of_tiles.h"

namespace vdcore::cpu::VDCORE_REST {
void frame_attention_tangents(const FrameTangents&);
}

namespace vdcore::cpu::VDCORE_ISA {
namespace {

// Tangents are rounded if they are not, as norm and rope leave them in float32.
bool in_bf16(const FrameTangents& a) {
  for (const TangentSegment& s : a.segment)
    for (const TensorView* x : {&s.q, &s.k, &s.v})
      if (*x && x->dtype != DType::bf16) return false;
  return true;
}

class MatrixProducts {
 public:
  static constexpr int64_t kPanel = 2 * W;
  static constexpr int64_t kQueryTile = 256;  // shares one transpose of the values

  MatrixProducts(int64_t channels, Arena& arena)
      : row(round_up(channels)),
        terms(whole_terms(channels)),
        depth(least_terms(channels)),
        t(kQueryTile, kPanel, round_up(channels), arena) {
    for (uint16_t** x : {&q, &dq}) *x = halves(arena, kQueryTile * terms);
    for (Rows* x : {&k, &dk, &stage}) *x = {halves(arena, kKeyTile * terms), terms};
    for (Rows* x : {&v, &dv}) *x = {halves(arena, row * kKeyTile), kKeyTile};
    for (Tile* x : {&scores, &tangents}) *x = {arena.floats(kKeyTile * kPanel), kPanel};
    for (Pairs* x : {&weights, &moved}) *x = {halves(arena, kKeyTile * kPanel), 2 * kPanel};
    out = arena.floats(kQueryTile * row);
  }

  const TangentResults& results() const { return t; }

  static int64_t tile_of(int64_t) { return kKeyTile; }

  void load_queries(const TangentSegment& segment, int64_t b, int64_t head, TokenRun tokens, float scale) {
    factor = __builtin_fabsf(scale);
    for (int64_t i = 0; i < tokens.size(); i += kPanel)
      for (const auto& [x, to] : {Packed{segment.q, q}, Packed{segment.dq, dq}}) {
        if (!x) continue;
        gather_rows(x, b, head, piece(tokens, i, kPanel), kPanel, stage);
        pack_transposed(kPanel, terms, stage, panel(to, i), scale < 0 ? 0x80008000u : 0u);  // the factor is positive
      }
  }

  void attend(const TangentSegment& from, int64_t b, int64_t kv_head, TokenRun tokens, int64_t count,
              KeysOfTile which) const {
    const bool first = which.first, moves = which.moves;
    const int64_t keys = tokens.size(), steps = whole_terms(keys);
    gather_rows(from.k, b, kv_head, tokens, steps, k);
    if (from.dk) gather_rows(from.dk, b, kv_head, tokens, steps, dk);
    if (moves) gather_transposed(from.v, b, kv_head, tokens, which.all, v);
    if (from.dv) gather_transposed(from.dv, b, kv_head, tokens, false, dv);
    for (int64_t i = 0; i < count; i += kPanel) {
      product(steps, kPanel, depth, k, panel(q, i), scores, false);
      if (from.dq) product(steps, kPanel, depth, k, panel(dq, i), tangents, false);
      if (from.dk) product(steps, kPanel, depth, dk, panel(q, i), tangents, static_cast<bool>(from.dq));
      hide_padding(keys);
      for (int64_t lane = 0; lane < kPanel; lane += W)
        if (from.dv)
          weigh<true>(lane, keys, i + lane, which);
        else
          weigh<false>(lane, keys, i + lane, which);
      if (moves) product(row, kPanel, steps, v, moved, result(i), !first);
      if (from.dv) product(row, kPanel, steps, dv, weights, result(i), !first || moves);
    }
  }

  // The panels' results, transposed into rows.
  void finish(int64_t count) const {
    for (int64_t i = 0; i < count; i += kPanel)
      transpose(row, smaller(kPanel, count - i), result(i), 1.f, t.out.at(i, 0));
  }

 private:
  static constexpr int64_t kKeyTile = 128;
  struct Packed {
    const TensorView& x;
    uint16_t* to;
  };

  const int64_t row, terms, depth;
  TileScope registers;
  TangentResults t;
  uint16_t *q, *dq;       // per panel pairs (terms, kPanel)
  Rows k, dk, stage;      // (kKeyTile, terms)
  Rows v, dv;             // (row, kKeyTile)
  Tile scores, tangents;  // (kKeyTile, kPanel)
  Pairs weights, moved;   // (kKeyTile, kPanel)
  float* out;             // per panel (row, kPanel)
  float factor = 0;       // from a product to a score

  Pairs panel(uint16_t* of, int64_t first_query) const { return {of + first_query * terms, 2 * kPanel}; }
  Tile result(int64_t first_query) const { return {out + first_query * row, kPanel}; }

  void gather_transposed(const TensorView& x, int64_t b, int64_t kv_head, TokenRun tokens, bool centered,
                         Rows to) const {
    const int64_t steps = whole_terms(tokens.size());
    gather_rows(x, b, kv_head, tokens, steps, stage);
    if (centered) center(tokens.size());
    transpose_rows(steps, row, stage, to);
  }

  // What pads the keys to whole steps weighs 0.
  void hide_padding(int64_t keys) const {
    for (int64_t j = keys; j < whole_terms(keys); ++j)
      for (int64_t lane = 0; lane < kPanel; lane += W) store(scores.at(j, lane).data, splat(-kInf));
  }

  VDCORE_INLINE vf probability(const float* score, vf lse) const { return exp2(load(score) * (factor * kLog2E) - lse); }

  // A vector of queries: what becomes of its scores and their tangents.
  template <bool kValuesMove>
  void weigh(int64_t lane, int64_t keys, int64_t query, KeysOfTile which) const {
    if (!which.moves) return weigh_still(lane, keys, query);
    if (which.all) return weigh_all<kValuesMove>(lane, keys, query);
    weigh_some<kValuesMove>(lane, keys, query, which.first);
  }

  // Scores without a tangent become P, in pairs.
  void weigh_still(int64_t lane, int64_t keys, int64_t query) const {
    const float* score = scores.data + lane;
    const vf lse = load(t.lse + query);
    for (int64_t j = 0; j < whole_terms(keys); j += 2, score += 2 * kPanel)
      store_words(weights.at(j, lane).data, pair(probability(score, lse), probability(score + kPanel, lse)));
  }

  // They become P, where values have a tangent, and P (E - shift), in pairs.
  template <bool kValuesMove>
  void weigh_some(int64_t lane, int64_t keys, int64_t query, bool first) const {
    const float *score = scores.data + lane, *tangent = tangents.data + lane;
    if (first) {
      vf total = {};
      for (int64_t j = 0; j < keys; ++j) total += load(tangent + j * kPanel);
      store(t.shift + query, total * (factor / static_cast<float>(keys)));
    }
    const vf lse = load(t.lse + query), shift = load(t.shift + query);
    vf sum = {}, sum_of_terms = {};
    for (int64_t j = 0; j < whole_terms(keys); j += 2, score += 2 * kPanel, tangent += 2 * kPanel) {
      const vf p[] = {probability(score, lse), probability(score + kPanel, lse)};
      const vf pe[] = {p[0] * (load(tangent) * factor - shift), p[1] * (load(tangent + kPanel) * factor - shift)};
      if constexpr (kValuesMove) store_words(weights.at(j, lane).data, pair(p[0], p[1]));
      store_words(moved.at(j, lane).data, pair(pe[0], pe[1]));
      sum += pe[0] + pe[1];
      sum_of_terms += as_bf16(pe[0]) + as_bf16(pe[1]);
    }
    store(t.sum + query, load(t.sum + query) + sum);
    store(t.sum_of_terms + query, load(t.sum_of_terms + query) + sum_of_terms);
  }

  // The same of all keys that they see: P (E - dlse), and dlse.
  template <bool kValuesMove>
  void weigh_all(int64_t lane, int64_t keys, int64_t query) const {
    float *score = scores.data + lane, *tangent = tangents.data + lane;
    vf total = {};
    for (int64_t j = 0; j < keys; ++j) total += load(tangent + j * kPanel);
    const vf lse = load(t.lse + query);
    TangentOfSum sum{total * (1.f / static_cast<float>(keys))};
    for (int64_t j = 0; j < whole_terms(keys); ++j) {
      const vf p = probability(score + j * kPanel, lse);
      store(score + j * kPanel, p);
      sum.add(j, p, load(tangent + j * kPanel));
    }
    const auto found = sum.find();
    const vf dlse = found.dlse, inverse = found.inverse;
    store(t.sum + query, dlse * factor);
    for (int64_t j = 0; j < whole_terms(keys); j += 2, score += 2 * kPanel, tangent += 2 * kPanel) {
      const vf p[] = {load(score) * inverse, load(score + kPanel) * inverse};
      const vf e[] = {load(tangent), load(tangent + kPanel)};
      if constexpr (kValuesMove) store_words(weights.at(j, lane).data, pair(p[0], p[1]));
      store_words(moved.at(j, lane).data, pair(p[0] * ((e[0] - dlse) * factor), p[1] * ((e[1] - dlse) * factor)));
    }
  }

  // Staged values less a large mean, where they have one: rounded, P (E - dlse) does not quite add up to 0, and would
  // bring it in. Such differences of bfloat16 numbers are exact.
  void center(int64_t keys) const {
    const int64_t step = (keys + 15) / 16;
    for (int64_t c = 0; c < row; c += W) {
      vf sum = {}, squares = {};
      float count = 0;
      for (int64_t j = 0; j < keys; j += step, ++count) {
        const vf x = Element<DType::bf16>::load(stage.at(j, c).data);
        sum += x, squares += x * x;
      }
      const vf less = as_bf16(large_mean(sum, squares, count));
      const bool any = any_lane(less != 0.f);
      for (int64_t j = 0; any && j < keys; ++j)
        Element<DType::bf16>::store(stage.at(j, c).data, Element<DType::bf16>::load(stage.at(j, c).data) - less);
    }
  }
};

}  // namespace

void frame_attention_tangents(const FrameTangents& a) {
  if (!in_bf16(a)) return VDCORE_REST::frame_attention_tangents(a);
  QueryTilesJob<Tangents<MatrixProducts>>(a).run_all();
}

}  // namespace vdcore::cpu::VDCORE_ISA
