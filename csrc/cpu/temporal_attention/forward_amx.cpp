// Temporal attention, forward, of bfloat16 in pairs: in AMX's tiles, or in dot products. Other dtypes, a bias and more
// frames than a step holds go as without them.
#include "cpu/qk_norm_rope/stage_norm_rope.h"
#include "cpu/temporal_attention/forward.h"
#include "cpu/temporal_attention/pairs_of_frames.h"

namespace vdcore::cpu::VDCORE_FLOATS {
void temporal_attention_forward(const TemporalAttention&);
}

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class MatrixStep {
 public:
  using Plan = TemporalPlan;

  MatrixStep(const TemporalPlan& plan, Arena& arena)
      : p(plan),
        n(plan.shape),
        kv_heads(plan.heads / plan.shape.group),
        terms(whole_terms(n.D)),
        depth(least_terms(n.D)),
        key_rows(whole_terms(n.K)),
        t(plan, arena),
        norm_rope(plan.a, n.row, arena),
        q(plan.heads, plan.query_block, terms, arena),
        k(kv_heads, key_rows, terms, arena),
        v(plan.a.v, kv_heads, n.K, n.row, arena) {
    if (transformed(p.a)) floats = arena.floats(larger(p.rows(), kv_heads * n.K) * n.row);
    queries = {halves(arena, terms * p.query_block), 2 * p.query_block};
    scores = {arena.floats(key_rows * p.query_block), p.query_block};
    words = {halves(arena, key_rows * p.query_block), 2 * p.query_block};
    weights = {halves(arena, p.query_block * key_rows), key_rows};
  }

  int64_t bytes_at_once() const { return 64; }

  void run(const Place& place, Prefetch& prefetch) {
    const HeadRange kv = place.kv_heads(n.group);
    const SeenKeys seen(visible_keys(p.a, place.b, 0), n.T, 0, n.K);
    for (const Run& run : seen.runs) {
      if (!run.size()) continue;
      load_rows(p.a.k, place, run, kv, k, run.begin, kKeys);
      v.load(place, run, kv);
    }
    const int64_t lines = p.bytes_of_head() / (64 * 3) + 1;  // of a head of the next step, a third each time
    for (int64_t i = 0; i < n.T; i += p.query_block) {
      const Run block = {i, smaller(n.T, i + p.query_block)};
      const VisibleKeys visible = visible_keys(p.a, place.b, i);
      load_rows(p.a.q, place, block, place.heads, q, 0, kQueries);
      for (int64_t h = 0; h < place.heads.count; ++h) {
        const int64_t kv_head = h / n.group;
        if (h % n.group == 0) {
          if (i == 0) v.take_out_strange(visible, seen, kv_head);
          v.pack(kv_head);
        }
        attend(visible, h, block.size(), lines, prefetch);
        v.add_strange(visible, place, kv, kv_head, block.size(), weights, t.out.head(h));
      }
      write_results(p, t, place, block);
    }
  }

 private:
  enum Side { kQueries, kKeys };

  const TemporalPlan& p;
  const Shape& n;
  const int64_t kv_heads, terms, depth, key_rows;
  TileScope registers;
  TemporalResults t;
  StageNormRope norm_rope;
  PairStage q, k;
  PairValues v;
  float* floats = nullptr;  // rows before they are rounded, where there are norms or angles
  Pairs queries;            // (terms, query_block)
  Tile scores;              // (key_rows, query_block)
  Pairs words;              // the same, weights
  Rows weights;             // (query_block, key_rows)

  // Rows [offset, offset + frames.size()) of every head of `to` = rows of x in `frames`.
  void load_rows(const TensorView& x, const Place& place, Run frames, HeadRange heads, const PairStage& to,
                 int64_t offset, Side side) const {
    if (!floats) return gather(x, place, frames, heads, to, offset);
    const Stage stage = {floats, frames.size(), n.row};
    gather(x, place.b, place.s, frames, heads, n.D, stage, 0);
    if (side == kQueries)
      norm_rope.queries(p.a, place.b, place.s, frames, heads, stage);
    else
      norm_rope.keys(p.a, place.b, place.s, frames, heads, stage, 0);
    for (int64_t h = 0; h < heads.count; ++h)
      for (int64_t i = 0; i < frames.size(); ++i)
        write_row<DType::bf16>(reinterpret_cast<char*>(to.head(h).at(offset + i, 0).data), n.D,
                               stage.head(h).at(i, 0).data, 1.f);
  }

  void attend(const VisibleKeys& visible, int64_t head, int64_t count, int64_t lines, Prefetch& prefetch) const {
    const int64_t whole = whole_rows(count);
    const Rows keys = k.head(head / n.group);
    const Tile out = t.out.head(head);
    pack_transposed(whole, terms, q.head(head), queries,
                    p.a.scale < 0 ? 0x80008000u : 0u);  // so that the factor is positive
    fetch(lines, prefetch);
    if (visible.dense) product(whole_keys(n.K), whole, depth, keys, queries, scores, false);
    for (int64_t i = 0; i < whole; i += W) {
      const ColumnMask mask(visible, i, count, 0, n.K);
      const ColumnSteps steps(mask);
      for (int64_t r = 0; r < steps.count && !visible.dense; ++r) {
        const Run& run = steps.runs[r];
        product(run.size(), W, depth, keys.at(run.begin, 0), queries.at(0, i), scores.at(run.begin, i), false);
      }
      if (i == 0) fetch(lines, prefetch);
      softmax(mask, steps, head, i);
      if (visible.dense) continue;
      for (int64_t r = 0; r < steps.count; ++r) {
        const Run& run = steps.runs[r];
        product(W, n.row, run.size(), weights.at(i, run.begin), v.at(run.begin), out.at(i, 0), r > 0);
      }
      if (!steps.count) memset(out.at(i, 0).data, 0, W * n.row * sizeof(float));
    }
    fetch(lines, prefetch);
    if (visible.dense) product(whole, n.row, least_terms(n.K), weights, v.at(0), out, false);
  }

  // Scores of W queries become weights, as rows of them; hidden ones, and what fills up a step, exactly 0.
  void softmax(const ColumnMask& mask, const ColumnSteps& steps, int64_t head, int64_t i) const {
    const float factor = __builtin_fabsf(p.a.scale) * kLog2E;
    float* const column = scores.at(0, i).data;
    const int64_t row = scores.row;
    vf top = splat(-kInf);
    steps.for_each_key(
        mask,
        [&](int64_t j, bool masked) __attribute__((always_inline)) {
          vf x = load(column + j * row);
          if (masked) {
            x = select(mask.sees(j), x, splat(-kInf));
            store(column + j * row, x);
          }
          top = max(top, x);
        },
        [&](int64_t j) { store(column + j * row, splat(-kInf)); });
    // Subtracted before they are multiplied: a fused multiply and add of scores beyond 2^30 would leave the largest one
    // off 0 by what rounding took from it, more than exp2 bears.
    const vf base = select(top == -kInf, vf{}, top);
    vf even = {}, odd = {};
    for (int64_t r = 0; r < steps.count; ++r)
      for (int64_t j = steps.runs[r].begin; j < steps.runs[r].end; j += 2) {
        const vf first = exp2((load(column + j * row) - base) * factor);
        const vf second = exp2((load(column + (j + 1) * row) - base) * factor);
        even += first;
        odd += second;
        store_words(words.at(j, i).data, pair(first, second));
      }
    transpose_weights(steps, i, words, weights);
    store(t.maximum + head * p.query_block + i, top * factor);
    store(t.sum + head * p.query_block + i, even + odd);
  }
};

}  // namespace

void temporal_attention_forward(const TemporalAttention& a) {
  if (in_pairs(a)) {
    const TemporalPlan plan = forward_plan(a, kStageHalves);
    if (plan.one_key_block()) return run_temporal<MatrixStep>(plan);
  }
  VDCORE_FLOATS::temporal_attention_forward(a);
}

}  // namespace vdcore::cpu::VDCORE_ISA
