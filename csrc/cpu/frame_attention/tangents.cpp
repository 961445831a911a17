// Tangents of frame attention, in vectors.
#include "cpu/frame_attention/tangents_of_tiles.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class VectorProducts {
 public:
  static constexpr int64_t kPanel = 3 * W;  // queries whose scores stay in L1, as in forward
  static constexpr int64_t kQueryTile = 192 / kPanel * kPanel;

  VectorProducts(int64_t channels, Arena& arena)
      : D(channels), row(round_up(channels)), t(kQueryTile, kPanel, round_up(channels), arena) {
    for (Tile* x : {&q, &dq}) *x = {arena.floats(kQueryTile * row), kPanel};
    for (Tile* x : {&k, &dk, &v, &dv}) *x = {arena.floats(kKeyTile * row), row};
    for (Tile* x : {&p, &e}) *x = {arena.floats(kKeyTile * kPanel), kPanel};
  }

  const TangentResults& results() const { return t; }

  // Even ones: 256 keys are four 64s, not three 80s and a 16.
  static int64_t tile_of(int64_t keys) {
    const int64_t tiles = (keys + kKeyTile - 1) / kKeyTile;
    return tiles ? (keys + tiles - 1) / tiles : 0;
  }

  void load_queries(const TangentSegment& segment, int64_t b, int64_t head, TokenRun tokens, float scale) const {
    for (int64_t i = 0; i < tokens.size(); i += kPanel) {
      load_panel(segment.q, b, head, piece(tokens, i, kPanel), scale, panel(q, i));
      if (segment.dq) load_panel(segment.dq, b, head, piece(tokens, i, kPanel), scale, panel(dq, i));
    }
  }

  void attend(const TangentSegment& from, int64_t b, int64_t kv_head, TokenRun keys, int64_t count,
              KeysOfTile which) const {
    gather_run(from.k, b, kv_head, keys, k);
    if (which.moves) gather_run(from.v, b, kv_head, keys, v);
    if (from.dk) gather_run(from.dk, b, kv_head, keys, dk);
    if (from.dv) gather_run(from.dv, b, kv_head, keys, dv);
    NoPrefetch none;
    for (int64_t i = 0; i < count; i += kPanel) {
      const int64_t rows = smaller(kPanel, count - i), lanes = round_up(rows), n = keys.size();
      score_product(n, lanes, D, {k.data, row, 1}, panel(q, i), p, none);
      if (from.dq) score_product(n, lanes, D, {k.data, row, 1}, panel(dq, i), e, none);
      if (from.dk) product(n, lanes, D, {dk.data, row, 1}, panel(q, i), e, static_cast<bool>(from.dq), none);
      for (int64_t lane = 0; lane < lanes; lane += W) weigh(lane, n, i + lane, which);
      const bool more = !which.first;
      if (which.moves) product(rows, row, n, {e.data, 1, kPanel}, v, t.out.at(i, 0), more, none);
      if (from.dv) product(rows, row, n, {p.data, 1, kPanel}, dv, t.out.at(i, 0), more || which.moves, none);
    }
  }

  void finish(int64_t) const {}

 private:
  static constexpr int64_t kKeyTile = 80;  // scores and their tangents, 30 KB, and a usual prompt in one

  const int64_t D, row;
  TangentResults t;
  Tile q, dq;         // per panel (row, kPanel): transposed, times scale and log2(e)
  Tile k, dk, v, dv;  // (kKeyTile, row)
  Tile p, e;          // (kKeyTile, kPanel)

  Tile panel(const Tile& of, int64_t first_query) const { return {of.data + first_query * row, kPanel}; }

  void load_panel(const TensorView& x, int64_t b, int64_t head, TokenRun rows, float scale, Tile to) const {
    gather_run(x, b, head, rows, t.stage);
    transpose(rows.size(), D, t.stage, scale * kLog2E, to);
  }

  // A vector of queries: scores become P, their tangents P (E - shift).
  VDCORE_INLINE void weigh(int64_t lane, int64_t keys, int64_t query, KeysOfTile which) const {
    float *weight_at = p.data + lane, *moved_at = e.data + lane;
    const vf lse = load(t.lse + query);
    if (!which.moves) {
      for (int64_t j = 0; j < keys; ++j, weight_at += kPanel) store(weight_at, exp2(load(weight_at) - lse));
      return;
    }
    if (which.all) return weigh_all(weight_at, moved_at, keys, lse, t.sum + query);
    if (which.first) {
      vf total = {};
      for (int64_t j = 0; j < keys; ++j) total += load(moved_at + j * kPanel);
      store(t.shift + query, total * (kLn2 / static_cast<float>(keys)));
    }
    const vf shift = load(t.shift + query);
    KeySum sum;
    for (int64_t j = 0; j < keys; ++j, weight_at += kPanel, moved_at += kPanel) {
      const vf weight = exp2(load(weight_at) - lse), moved = weight * (load(moved_at) * kLn2 - shift);
      store(weight_at, weight);
      store(moved_at, moved);
      sum.add(j, moved);
    }
    sum.flush();
    for (float* x : {t.sum + query, t.sum_of_terms + query}) store(x, load(x) + sum.total);
  }

  // The same of all keys that they see: P (E - dlse), and dlse.
  VDCORE_INLINE void weigh_all(float* weight_at, float* moved_at, int64_t keys, vf lse, float* dlse_at) const {
    vf total = {};
    for (int64_t j = 0; j < keys; ++j) total += load(moved_at + j * kPanel);
    TangentOfSum sum{total * (1.f / static_cast<float>(keys))};
    for (int64_t j = 0; j < keys; ++j) {
      const vf weight = exp2(load(weight_at + j * kPanel) - lse);
      store(weight_at + j * kPanel, weight);
      sum.add(j, weight, load(moved_at + j * kPanel));
    }
    const auto found = sum.find();
    const vf dlse = found.dlse, inverse = found.inverse;
    store(dlse_at, dlse * kLn2);
    for (int64_t j = 0; j < keys; ++j, weight_at += kPanel, moved_at += kPanel) {
      const vf weight = load(weight_at) * inverse;
      store(weight_at, weight);
      store(moved_at, weight * ((load(moved_at) - dlse) * kLn2));
    }
  }
};

}  // namespace

void frame_attention_tangents(const FrameTangents& a) { QueryTilesJob<Tangents<VectorProducts>>(a).run_all(); }

}  // namespace vdcore::cpu::VDCORE_ISA
