// Temporal attention, forward: the token at one position attends to the same position in the frames that its frame
// sees.
//
// Sequences are tiny (8 to 128 frames) and there are very many, so a head's whole problem lives in L1 and L2 and the
// work is to feed it: see tiles.h. Longer sequences go block by block with the online softmax.
#include "cpu/temporal_attention/forward.h"

#include "cpu/qk_norm_rope/stage_norm_rope.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kStageFloats = 112 * 1024;  // Q, K and V rows of one step: with scores and results, under 1 MB

class FloatStep {
 public:
  using Plan = TemporalPlan;

  FloatStep(const TemporalPlan& plan, Arena& arena)
      : p(plan), n(plan.shape), t(plan, arena), norm_rope(plan.a, plan.shape.row, arena) {
    const bool as_they_lie = p.one_query_block() && !transformed(p.a);
    q_in_place = as_they_lie && n.D % W == 0;  // the transpose reads whole vectors
    k_in_place = as_they_lie && p.a.k.dtype == DType::f32;
    const int64_t kv_heads = p.heads / n.group;
    q = {arena.floats(p.heads * p.query_block * n.row), p.query_block, n.row};
    k = {arena.floats(kv_heads * p.key_block * n.row), p.key_block, n.row};
    v = {arena.floats(kv_heads * p.key_block * n.row), p.key_block, n.row};
    q_transposed = {arena.floats(n.row * p.query_block), p.query_block};
    scores = {arena.floats(p.key_block * p.query_block), p.query_block};
    factor = arena.floats(p.query_block);
    windows = reinterpret_cast<Run*>(arena.floats(p.query_block * sizeof(Run) / 4));
    lows = reinterpret_cast<Run*>(arena.floats(p.query_block * sizeof(Run) / 4));
  }

  int64_t bytes_at_once() const { return p.bytes_at_once(1, 1); }

  void run(const Place& place, Prefetch& prefetch) {
    const int64_t b = place.b, s = place.s, heads = place.heads.count;
    if (p.one_key_block()) gather_keys(SeenKeys(visible_keys(p.a, b, 0), n.T, 0, n.K), place, 0);
    for (int64_t first_query = 0; first_query < n.T; first_query += p.query_block) {
      const Run queries = {first_query, smaller(n.T, first_query + p.query_block)};
      const VisibleKeys visible = visible_keys(p.a, b, first_query);
      if (!q_in_place) {
        gather(p.a.q, b, s, queries, place.heads, n.D, q, 0);
        norm_rope.queries(p.a, b, s, queries, place.heads, q);
      }
      bool first = true;
      for (int64_t key = 0; key < n.K; key += p.key_block) {
        const Run keys = {key, smaller(n.K, key + p.key_block)};
        const SeenKeys seen(visible, queries.size(), key, keys.size());
        if (!seen.any()) continue;
        if (!p.one_key_block()) gather_keys(seen, place, key);
        if (!visible.dense) key_runs(visible, queries.size(), key, keys.size(), windows, lows);
        for (int64_t h = 0; h < heads; ++h) attend(place, visible, h, queries, keys, first, prefetch);
        first = false;
      }
      if (first) {  // these queries see nothing
        memset(t.out.data, 0, heads * p.query_block * n.row * sizeof(float));
        for (int64_t i = 0; i < heads * p.query_block; ++i) t.maximum[i] = -kInf, t.sum[i] = 0;
      }
      write_results(p, t, place, queries);
    }
  }

 private:
  const TemporalPlan& p;
  const Shape& n;
  TemporalResults t;
  StageNormRope norm_rope;
  // Queries and keys of one block are read once, by the transpose, which converts them too, and by the first product:
  // where their rows can be read as they lie, a copy would only be more traffic (at T = 16 a fifth of the time in
  // float32; queries alone 2 to 7 % in half precision). V is read once for every four queries.
  bool q_in_place, k_in_place;
  Stage q, k, v;
  Tile q_transposed, scores;
  float* factor;  // (query_block,)
  Run *windows, *lows;

  void gather_keys(const SeenKeys& seen, const Place& place, int64_t first_key) const {
    const HeadRange kv = place.kv_heads(n.group);
    for (const Run& run : seen.runs) {
      if (!run.size()) continue;
      const Run frames = {first_key + run.begin, first_key + run.end};
      if (!k_in_place) {
        gather(p.a.k, place.b, place.s, frames, kv, n.D, k, run.begin);
        norm_rope.keys(p.a, place.b, place.s, frames, kv, k, run.begin);
      }
      gather(p.a.v, place.b, place.s, frames, kv, n.D, v, run.begin);
    }
  }

  // One head, one block of queries, one block of keys.
  void attend(const Place& place, const VisibleKeys& visible, int64_t head, Run queries, Run keys, bool first,
              Prefetch& prefetch) const {
    const int64_t kv_head = head / n.group;
    const Tile from_k =
        k_in_place ? place.rows(p.a.k, keys.begin, place.kv_heads(n.group).first + kv_head) : k.head(kv_head);
    const Tile from_v = v.head(kv_head), out = t.out.head(head);
    transpose_queries(p, p.a.q, q_in_place, q, place, head, queries, q_transposed);
    score_products(visible, queries.size(), keys.begin, keys.size(), n.D, from_k, q_transposed, scores, prefetch);
    add_bias(p.a, place.heads.first + head, keys, queries, scores);
    for (int64_t i = 0; i < queries.size(); i += W) {
      SoftmaxState state;
      float *maximum = t.maximum + head * p.query_block + i, *sum = t.sum + head * p.query_block + i;
      if (!first) state = {load(maximum), load(sum)};
      const ColumnMask mask(visible, i, queries.size(), keys.begin, keys.size());
      const vf rescale = softmax_column(scores.at(0, i), mask, state);
      store(maximum, state.maximum);
      store(sum, state.sum);
      store(factor + i, rescale);
    }
    if (!first)
      for (int64_t i = 0; i < queries.size(); ++i)
        for (int64_t c = 0; c < n.row; c += W) {
          float* at = out.at(i, c).data;
          store(at, load(at) * factor[i]);
        }
    const Scalars weights = {scores.data, 1, scores.row};
    if (visible.dense) return product(queries.size(), n.row, keys.size(), weights, from_v, out, !first, prefetch);
    product_over_runs(queries.size(), n.row, windows, weights, from_v, out, !first, prefetch);
    product_over_runs(queries.size(), n.row, lows, weights, from_v, out, true, prefetch);
  }
};

}  // namespace

void temporal_attention_forward(const TemporalAttention& a) { run_temporal<FloatStep>(forward_plan(a, kStageFloats)); }

}  // namespace vdcore::cpu::VDCORE_ISA
