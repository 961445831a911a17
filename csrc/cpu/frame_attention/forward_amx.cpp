// Frame attention, forward, of bfloat16 in AMX's tiles; other dtypes as without them.
//
// Scores are K Q^T, so that keys are read as they lie, queries are packed once, and the softmax runs down the lanes.
// Results are V^T P: a tile of values is transposed once for all queries of the item, and probabilities become pairs of
// keys by a shift. The unit of tiles works beside the vectors', as far as the processor looks ahead, a few hundred
// instructions: so a panel's exponentials alternate with the products of the next panel's scores, 32 keys at a time.
// At D = 64 a panel's tile of keys takes 64 products, 1,024 cycles, and about 2,000 cycles of vectors.
#include "cpu/frame_attention/amx_rows.h"
#include "cpu/frame_attention/forward.h"

namespace vdcore::cpu::VDCORE_REST {
void frame_attention_forward(const FrameAttention&);
}

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kPanel = 2 * W;
constexpr int64_t kStep = kTileTerms;  // keys whose exponentials and scores alternate

class MatrixProducts {
 public:
  // Shares one transpose of the values: frames of 300 tokens under a mask took 0.91 to 0.93 of the time with 256, dense
  // attention 0.95 to 1.01.
  static constexpr int64_t kQueryTile = 384;
  static constexpr int64_t kKeyTile = 128;
  static constexpr bool kCenters = false;

  MatrixProducts(int64_t channels, Arena& arena)
      : row(round_up(channels)),
        terms(whole_terms(channels)),
        depth(least_terms(channels)),
        t(kQueryTile, round_up(channels), arena) {
    queries = halves(arena, kQueryTile * terms);
    stage = {halves(arena, kKeyTile * terms), terms};
    k = {halves(arena, kKeyTile * terms), terms};
    v = {halves(arena, row * kKeyTile), kKeyTile};
    for (Tile& tile : scores) tile = {arena.floats(kKeyTile * kPanel), kPanel};
    weights = {halves(arena, kKeyTile * kPanel), 2 * kPanel};
    out = arena.floats(kQueryTile * row);
  }

  const QueryResults& results() const { return t; }

  void load_queries(const TensorView& q, int64_t b, int64_t head, TokenRun tokens, float scale) {
    factor = __builtin_fabsf(scale) * kLog2E;
    for (int64_t i = 0; i < tokens.size(); i += kPanel) {
      gather_rows(q, b, head, piece(tokens, i, kPanel), kPanel, stage);
      pack_transposed(kPanel, terms, stage, panel(i), scale < 0 ? 0x80008000u : 0u);  // so that the factor is positive
    }
  }

  void attend(const TensorView& from_k, const TensorView& from_v, int64_t b, int64_t kv_head, TokenRun tokens,
              int64_t count, bool first) const {
    const int64_t keys = tokens.size(), steps = whole_terms(keys);
    gather_rows(from_k, b, kv_head, tokens, steps, k);
    gather_rows(from_v, b, kv_head, tokens, steps, stage);
    transpose_rows(steps, row, stage, v);
    vf base[2];
    for (int64_t j = 0; j < steps; j += kStep) score(0, j);
    find_base(0, keys, first, base);
    for (int64_t i = 0; i < count; i += kPanel) {
      const bool more = i + kPanel < count;
      vf total[2] = {};
      for (int64_t j = 0; j < steps; j += kStep) {
        if (more) score(i + kPanel, j);
        weigh(i, j, smaller(kStep, keys - j), base, total);
      }
      for (int64_t lane = 0; lane < 2; ++lane) {
        float* sum = t.sum + i + lane * W;
        store(sum, load(sum) + total[lane]);
      }
      product(row, kPanel, steps, v, weights, result(i), !first);
      if (more) find_base(i + kPanel, keys, first, base);
    }
  }

  // The panels' results, transposed into rows; maxima become scores.
  void finish(int64_t count) const {
    for (int64_t i = 0; i < count; i += W) store(t.maximum + i, load(t.maximum + i) * factor);
    for (int64_t i = 0; i < count; i += kPanel)
      transpose(row, smaller(kPanel, count - i), result(i), 1.f, t.out.at(i, 0));
  }

 private:
  const int64_t row, terms, depth;
  TileScope registers;
  QueryResults t;
  uint16_t* queries;  // per panel pairs (terms, kPanel)
  Rows stage;         // (kKeyTile, terms)
  Rows k, v;          // (kKeyTile, terms), (row, kKeyTile)
  Tile scores[2];     // (kKeyTile, kPanel), of panels in turn
  Pairs weights;      // (kKeyTile, kPanel)
  float* out;         // per panel (row, kPanel)
  float factor = 0;   // from a product to a score in base 2

  Pairs panel(int64_t first_query) const { return {queries + first_query * terms, 2 * kPanel}; }
  Tile result(int64_t first_query) const { return {out + first_query * row, kPanel}; }
  const Tile& scores_of(int64_t first_query) const { return scores[first_query / kPanel % 2]; }

  // Scores of a panel against kStep keys from `key` on.
  void score(int64_t i, int64_t key) const {
    product(kStep, kPanel, depth, k.at(key, 0), panel(i), scores_of(i).at(key, 0), false);
  }

  // Brings the panel's maximum up to date, and what was summed up before with it. `base`: what exponents are taken
  // from, 0 where all scores are -inf. Both are products: a fused multiply and add with a score as its base would leave
  // the largest of them, beyond 2^30, off 0 by what rounding took from it, more than exp2 bears.
  void find_base(int64_t i, int64_t keys, bool first, vf* base) const {
    for (int64_t lane = 0; lane < 2; ++lane) {
      const float* column = scores_of(i).at(0, lane * W).data;
      vf top = splat(-kInf);
      for (int64_t j = 0; j < keys; ++j) top = max(top, load(column + j * kPanel));
      float *maximum = t.maximum + i + lane * W, *sum = t.sum + i + lane * W;
      const vf before = load(maximum), now = max(before, top);
      base[lane] = select(now == -kInf, vf{}, now);
      store(maximum, now);
      if (first) continue;
      const vf rescale = exp2((before - base[lane]) * factor);
      store(sum, load(sum) * rescale);
      float* at = result(i).at(0, lane * W).data;
      for (int64_t c = 0; c < row; ++c, at += kPanel) store(at, load(at) * rescale);
    }
  }

  // Scores of `keys` keys from `key` on become weights; what pads them to kStep weighs 0.
  void weigh(int64_t i, int64_t key, int64_t keys, const vf* base, vf* total) const {
    for (int64_t lane = 0; lane < 2; ++lane) {
      const float* column = scores_of(i).at(key, lane * W).data;
      uint16_t* to = weights.at(key, lane * W).data;
      vf even = {}, odd = {};
      int64_t j = 0;
      for (; j + 2 <= keys; j += 2, column += 2 * kPanel, to += weights.row) {
        const vf first = exp2((load(column) - base[lane]) * factor);
        const vf second = exp2((load(column + kPanel) - base[lane]) * factor);
        even += first;
        odd += second;
        store_words(to, pair(first, second));
      }
      if (j < keys) {
        const vf last = exp2((load(column) - base[lane]) * factor);
        even += last;
        store_words(to, pair(last, vf{}));
        j += 2;
        to += weights.row;
      }
      for (; j < kStep; j += 2, to += weights.row) store_words(to, vu{});
      total[lane] += even + odd;
    }
  }
};

}  // namespace

void frame_attention_forward(const FrameAttention& a) {
  if (!in_bf16(a)) return VDCORE_REST::frame_attention_forward(a);
  QueryTilesJob<Forward<MatrixProducts>>(a).run_all();
}

}  // namespace vdcore::cpu::VDCORE_ISA
