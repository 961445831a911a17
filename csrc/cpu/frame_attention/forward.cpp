// Frame attention, forward, in vectors.
//
// Queries go in panels of three vectors: a panel's scores against a key tile stay in L1 from the first product through
// the softmax to the second, and three vectors are what the register block of a product holds best.
#include "cpu/frame_attention/forward.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kPanel = 3 * W;

// Scores of one vector of queries become exp2(score - maximum), in place; returns the factor for what was summed up
// before.
VDCORE_INLINE vf softmax_keys(float* column, int64_t keys, float* maximum, float* sum) {
  const vf before = load(maximum);
  vf top = before;
  for (int64_t j = 0; j < keys; ++j) top = max(top, load(column + j * kPanel));
  const vf base = select(top == -kInf, vf{}, top);  // all scores -inf: exp2(-inf - 0) is 0, not NaN
  const vf factor = exp2(before - base);
  vf total = {};
  for (int64_t j = 0; j < keys; ++j) {
    const vf p = exp2(load(column + j * kPanel) - base);
    total += p;
    store(column + j * kPanel, p);
  }
  store(maximum, top);
  store(sum, load(sum) * factor + total);
  return factor;
}

class VectorProducts {
 public:
  static constexpr int64_t kQueryTile = 192 / kPanel * kPanel;  // shares one gathering of the keys
  static constexpr int64_t kKeyTile = 128;
  static constexpr bool kCenters = true;

  VectorProducts(int64_t channels, Arena& arena)
      : D(channels), row(round_up(channels)), t(kQueryTile, round_up(channels), arena) {
    queries = {arena.floats(kQueryTile * row), kPanel};
    stage = {arena.floats(kPanel * row), row};
    k = {arena.floats(kKeyTile * row), row};
    v = {arena.floats(kKeyTile * row), row};
    scores = {arena.floats(kKeyTile * kPanel), kPanel};
  }

  const QueryResults& results() const { return t; }

  void load_queries(const TensorView& q, int64_t b, int64_t head, TokenRun tokens, float scale) const {
    for (int64_t i = 0; i < tokens.size(); i += kPanel) {
      const TokenRun rows = piece(tokens, i, kPanel);
      gather_run(q, b, head, rows, stage);
      transpose(rows.size(), D, stage, scale * kLog2E, panel(i));
    }
  }

  void attend(const TensorView& from_k, const TensorView& from_v, int64_t b, int64_t kv_head, TokenRun keys,
              int64_t count, bool first) const {
    gather_run(from_k, b, kv_head, keys, k);
    if (from_v.dtype == DType::f32)
      gather_centered(from_v, b, kv_head, keys);
    else
      gather_run(from_v, b, kv_head, keys, v);
    NoPrefetch none;
    for (int64_t i = 0; i < count; i += kPanel) {
      const int64_t rows = smaller(kPanel, count - i), lanes = round_up(rows);
      score_product(keys.size(), lanes, D, {k.data, row, 1}, panel(i), scores, none);
      for (int64_t lane = 0; lane < lanes; lane += W) {
        const vf factor = softmax_keys(scores.data + lane, keys.size(), t.maximum + i + lane, t.sum + i + lane);
        if (!first) rescale(i + lane, smaller(W, rows - lane), factor);
      }
      product(rows, row, keys.size(), {scores.data, 1, kPanel}, v, t.out.at(i, 0), !first, none);
    }
  }

  void finish(int64_t) const {}

 private:
  const int64_t D, row;
  QueryResults t;
  Tile queries;  // per panel (row, kPanel): transposed, times scale and log2(e)
  Tile stage;    // (kPanel, row)
  Tile k, v;     // (kKeyTile, row)
  Tile scores;   // (kKeyTile, kPanel)

  Tile panel(int64_t first_query) const { return {queries.data + first_query * row, kPanel}; }

  void gather_centered(const TensorView& from, int64_t b, int64_t kv_head, TokenRun keys) const {
    for_each_row(from, b, kv_head, keys, [&](const char* in, int64_t j) __attribute__((always_inline)) {
      const auto* p = reinterpret_cast<const float*>(in);
      float* to = v.at(j, 0).data;
      int64_t c = 0;
      for (; c + W <= D; c += W) store(to + c, load(p + c) - load(t.center + c));
      if (c < D) store(to + c, load_partial<DType::f32>(p + c, D - c) - load(t.center + c));
    });
  }

  void rescale(int64_t first_row, int64_t rows, vf factor) const {
    float lanes[W];
    store(lanes, factor);
    for (int64_t i = 0; i < rows; ++i) {
      if (lanes[i] == 1.f) continue;
      float* at = t.out.at(first_row + i, 0).data;
      for (int64_t c = 0; c < row; c += W) store(at + c, load(at + c) * lanes[i]);
    }
  }
};

}  // namespace

void frame_attention_forward(const FrameAttention& a) { QueryTilesJob<Forward<VectorProducts>>(a).run_all(); }

}  // namespace vdcore::cpu::VDCORE_ISA
