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

bool in_bf16(const FrameTangents& a) {
  for (const TangentSegment& s : a.segment)
    for (const TensorView* x : {&s.q, &s.k, &s.v, &s.dq, &s.dk, &s.dv})
      if (*x && x->dtype != DType::bf16) return false;
  return true;
}

class MatrixProducts {
 public:
  static constexpr int64_t kPanel = 2 * W;
  static constexpr int64_t kQueryTile = 256;  // shares one transpose of the values

  MatrixProducts(int64_t channels, Arena& arena)
      : row(round_up(channels)), terms(whole_terms(channels)), t(kQueryTile, kPanel, round_up(channels), arena) {
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
      product(steps, kPanel, terms, k, panel(q, i), scores, false);
      if (from.dq) product(steps, kPanel, terms, k, panel(dq, i), tangents, false);
      if (from.dk) product(steps, kPanel, terms, dk, panel(q, i), tangents, static_cast<bool>(from.dq));
      for (int64_t lane = 0; lane < kPanel; lane += W)
        if (which.all && moves)
          weigh_all(lane, keys, i + lane, static_cast<bool>(from.dv));
        else
          weigh(lane, keys, i + lane, first, moves);
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

  const int64_t row, terms;
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

  // A vector of queries: scores become P, and their tangents P (E - shift), in pairs; 0 for what pads the keys.
  VDCORE_INLINE void weigh(int64_t lane, int64_t keys, int64_t query, bool first, bool moves) const {
    const float *score = scores.data + lane, *tangent = tangents.data + lane;
    const vf lse = load(t.lse + query);
    if (first && moves) {
      vf total = {};
      for (int64_t j = 0; j < keys; ++j) total += load(tangent + j * kPanel);
      store(t.shift + query, total * (factor / static_cast<float>(keys)));
    }
    const vf shift = load(t.shift + query);
    vf sum = {}, sum_of_terms = {};
    for (int64_t j = 0; j < whole_terms(keys); j += 2) {
      vf p[2] = {}, pe[2] = {};
      for (int64_t i = 0; i < smaller(2, keys - j); ++i) {
        p[i] = exp2(load(score + (j + i) * kPanel) * (factor * kLog2E) - lse);
        if (moves) pe[i] = p[i] * (load(tangent + (j + i) * kPanel) * factor - shift);
      }
      store_words(weights.at(j, lane).data, pair(p[0], p[1]));
      if (!moves) continue;
      store_words(moved.at(j, lane).data, pair(pe[0], pe[1]));
      sum += pe[0] + pe[1];
      sum_of_terms += as_bf16(pe[0]) + as_bf16(pe[1]);
    }
    store(t.sum + query, load(t.sum + query) + sum);
    store(t.sum_of_terms + query, load(t.sum_of_terms + query) + sum_of_terms);
  }

  // The same of all keys that they see: P (E - dlse), and dlse. Less a guess, E's mean, so that dlse does not have the
  // error of a sum of P that is not quite 1, and a query with one key gets 0 exactly.
  VDCORE_INLINE void weigh_all(int64_t lane, int64_t keys, int64_t query, bool values_move) const {
    float *score = scores.data + lane, *tangent = tangents.data + lane;
    vf total = {};
    for (int64_t j = 0; j < keys; ++j) total += load(tangent + j * kPanel);
    const vf lse = load(t.lse + query), guess = total * (1.f / static_cast<float>(keys));
    KeySum sum;
    for (int64_t j = 0; j < keys; ++j) {
      const vf p = exp2(load(score + j * kPanel) * (factor * kLog2E) - lse);
      store(score + j * kPanel, p);
      sum.add(j, p * (load(tangent + j * kPanel) - guess));
    }
    sum.flush();
    const vf dlse = sum.total + guess;
    store(t.sum + query, dlse * factor);
    for (int64_t j = 0; j < whole_terms(keys); j += 2) {
      vf p[2] = {}, pe[2] = {};
      for (int64_t i = 0; i < smaller(2, keys - j); ++i) {
        p[i] = load(score + (j + i) * kPanel);
        pe[i] = p[i] * ((load(tangent + (j + i) * kPanel) - dlse) * factor);
      }
      if (values_move) store_words(weights.at(j, lane).data, pair(p[0], p[1]));
      store_words(moved.at(j, lane).data, pair(pe[0], pe[1]));
    }
  }

  // Staged values less a mean that is twice their deviation or more, where they have one: rounded, P (E - dlse) does
  // not quite add up to 0, and would bring it in. Such differences of bfloat16 numbers are exact.
  void center(int64_t keys) const {
    const int64_t step = (keys + 15) / 16;
    for (int64_t c = 0; c < row; c += W) {
      vf sum = {}, squares = {}, count = {};
      for (int64_t j = 0; j < keys; j += step) {
        const vf x = Element<DType::bf16>::load(stage.at(j, c).data);
        sum += x, squares += x * x, count += 1.f;
      }
      const vf mean = as_bf16(sum / count), less = select(1.25f * mean * mean * count > squares, mean, vf{});
      float lanes[W];
      store(lanes, less);
      bool any = false;
      for (float x : lanes) any |= x != 0;
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
