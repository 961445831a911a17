// Tangents of temporal attention, of bfloat16 in pairs: in AMX's tiles, or in dot products. Other dtypes, a bias and
// more frames than a step holds go as without them.
//
// As forward (forward_amx.cpp): scores and their tangents are K Q^T, K dQ^T and dK Q^T, results (P (E - dlse)) V and
// P dV. All keys of a query are in a step, so that its dlse is known before results. A row of P (E - dlse) adds up to
// 0, but not once it is rounded: what is left would bring in the values' mean, and is taken out with it.
#include "cpu/temporal_attention/pairs_of_frames.h"
#include "cpu/temporal_attention/tangents_of_steps.h"

namespace vdcore::cpu::VDCORE_REST {
void temporal_attention_tangents(const TemporalTangents&);
}

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class MatrixTangents {
 public:
  using Plan = TemporalTangentsPlan;

  MatrixTangents(const Plan& plan, Arena& arena)
      : p(plan),
        n(plan.shape),
        kv_heads(plan.heads / plan.shape.group),
        terms(whole_terms(n.D)),
        depth(least_terms(n.D)),
        key_rows(whole_terms(n.K)),
        t(plan, arena),
        q(plan.heads, plan.query_block, terms, arena),
        dq(plan.given.dq ? plan.heads : 0, plan.query_block, terms, arena),
        k(kv_heads, key_rows, terms, arena),
        dk(plan.given.dk ? kv_heads : 0, key_rows, terms, arena),
        v(plan.a.v, plan.moves ? kv_heads : 0, n.K, n.row, arena),
        dv(plan.given.dv, plan.given.dv ? kv_heads : 0, n.K, n.row, arena) {
    for (Pairs* x : {&queries, &moved_queries}) *x = {halves(arena, terms * p.query_block), 2 * p.query_block};
    for (Tile* x : {&scores, &tangents}) *x = {arena.floats(key_rows * p.query_block), p.query_block};
    words = {halves(arena, key_rows * p.query_block), 2 * p.query_block};
    for (Rows* x : {&weights, &moved}) *x = {halves(arena, p.query_block * key_rows), key_rows};
    left = arena.floats(p.query_block);
    mean = arena.floats(n.row);
  }

  int64_t bytes_at_once() const { return 64; }

  void run(const Place& place, Prefetch& prefetch) {
    const HeadRange kv = place.kv_heads(n.group);
    const SeenKeys seen(visible_keys(p.a, place.b, 0), n.T, 0, n.K);
    load_keys(place, seen, kv);
    const int64_t lines = p.bytes_of_head() / (64 * 3) + 1;  // of a head of the next step, a third each time
    for (int64_t i = 0; i < n.T; i += p.query_block) {
      const Run block = {i, smaller(n.T, i + p.query_block)};
      const VisibleKeys visible = visible_keys(p.a, place.b, i);
      gather(p.a.q, place, block, place.heads, q, 0);
      if (p.given.dq) gather(p.given.dq, place, block, place.heads, dq, 0);
      t.load_lse(p, place, block);
      for (int64_t h = 0; h < place.heads.count; ++h) {
        const int64_t kv_head = h / n.group, count = block.size();
        const Tile out = t.out.head(h);
        if (h % n.group == 0) pack_values(visible, seen, kv_head, i == 0);
        attend(visible, h, count, lines, prefetch);
        if (p.moves) v.add_strange(visible, place, kv, kv_head, count, moved, out);
        if (p.given.dv) dv.add_strange(visible, place, kv, kv_head, count, weights, out);
      }
      t.write(p, place, block);
    }
  }

 private:
  const Plan& p;
  const Shape& n;
  const int64_t kv_heads, terms, depth, key_rows;
  TileScope registers;
  TemporalTangentResults t;
  PairStage q, dq, k, dk;
  PairValues v, dv;
  Pairs queries, moved_queries;  // (terms, query_block)
  Tile scores, tangents;         // (key_rows, query_block): then P and E
  Pairs words;                   // the same, weights
  Rows weights, moved;           // (query_block, key_rows): P and P (E - dlse)
  float* left;                   // (query_block,): the sum of a row of P (E - dlse), rounded
  float* mean;                   // (row,): of some values, where it is large
  bool has_mean = false;         // it is, somewhere

  void load_keys(const Place& place, const SeenKeys& seen, HeadRange kv) const {
    for (const Run& run : seen.runs) {
      if (!run.size()) continue;
      gather(p.a.k, place, run, kv, k, run.begin);
      if (p.given.dk) gather(p.given.dk, place, run, kv, dk, run.begin);
      if (p.moves) v.load(place, run, kv);
      if (p.given.dv) dv.load(place, run, kv);
    }
  }

  void pack_values(const VisibleKeys& visible, const SeenKeys& seen, int64_t kv_head, bool first) {
    for (const auto& [values, there] : {ValuesOf{v, p.moves}, ValuesOf{dv, static_cast<bool>(p.given.dv)}}) {
      if (!there) continue;
      if (first) values.take_out_strange(visible, seen, kv_head);
      values.pack(kv_head);
    }
    has_mean = p.moves && find_mean(seen, v.head(kv_head));
  }
  struct ValuesOf {
    const PairValues& values;
    bool there;
  };

  // Of at most eight rows of values that somebody sees; whether any is large.
  bool find_mean(const SeenKeys& seen, Rows values) const {
    int64_t keys[kMeanKeys], count = 0, next = 0, before = 0;
    const int64_t step = (seen.runs[0].size() + seen.runs[1].size() + kMeanKeys - 1) / kMeanKeys;
    for (const Run& run : seen.runs) {
      for (; next < before + run.size(); next += step) keys[count++] = run.begin + next - before;
      before += run.size();
    }
    vi any = {};
    for (int64_t c = 0; c < n.row; c += W) {
      vf sum = {}, squares = {};
      for (int64_t i = 0; i < count; ++i) {
        const vf x = Element<DType::bf16>::load(values.at(keys[i], c).data);
        sum += x, squares += x * x;
      }
      const vf found = large_mean(sum, squares, static_cast<float>(larger(count, 1)));
      store(mean + c, found);
      any |= found != 0.f;
    }
    return any_lane(any);
  }
  static constexpr int64_t kMeanKeys = 8;

  void attend(const VisibleKeys& visible, int64_t head, int64_t count, int64_t lines, Prefetch& prefetch) const {
    const int64_t whole = whole_rows(count), kv_head = head / n.group;
    const uint32_t flip = p.a.scale < 0 ? 0x80008000u : 0u;  // so that the factor is positive
    const Tile out = t.out.head(head);
    pack_transposed(whole, terms, q.head(head), queries, flip);
    if (p.given.dq) pack_transposed(whole, terms, dq.head(head), moved_queries, flip);
    fetch(lines, prefetch);
    if (visible.dense) score(kv_head, {0, whole_keys(n.K)}, 0, whole);
    for (int64_t i = 0; i < whole; i += W) {
      const ColumnMask mask(visible, i, count, 0, n.K);
      const ColumnSteps steps(mask);
      for (int64_t r = 0; r < steps.count && !visible.dense; ++r) score(kv_head, steps.runs[r], i, W);
      if (i == 0) fetch(lines, prefetch);
      weigh(mask, steps, head, i);
      for (int64_t r = 0; r < steps.count && !visible.dense; ++r) add(steps.runs[r], i, W, out.at(i, 0), r > 0);
      if (!steps.count) memset(out.at(i, 0).data, 0, W * n.row * sizeof(float));
    }
    fetch(lines, prefetch);
    if (visible.dense) add({0, least_terms(n.K)}, 0, whole, out, false);
    for (int64_t i = 0; i < count && has_mean; ++i)
      for (int64_t c = 0; c < n.row; c += W) {
        float* at = out.at(i, c).data;
        store(at, load(at) - left[i] * load(mean + c));
      }
  }

  // Scores of `width` queries from i on against a run of keys, and their tangents.
  void score(int64_t kv_head, Run keys, int64_t i, int64_t width) const {
    const Tile to = tangents.at(keys.begin, i);
    const Rows from = k.head(kv_head).at(keys.begin, 0);
    product(keys.size(), width, depth, from, queries.at(0, i), scores.at(keys.begin, i), false);
    if (p.given.dq) product(keys.size(), width, depth, from, moved_queries.at(0, i), to, false);
    if (p.given.dk)
      product(keys.size(), width, depth, dk.head(kv_head).at(keys.begin, 0), queries.at(0, i), to,
              static_cast<bool>(p.given.dq));
  }

  // Adds what a run of keys brings to the results of `width` queries from i on.
  void add(Run keys, int64_t i, int64_t width, Tile out, bool more) const {
    if (p.moves) product(width, n.row, keys.size(), moved.at(i, keys.begin), v.at(keys.begin), out, more);
    if (p.given.dv)
      product(width, n.row, keys.size(), weights.at(i, keys.begin), dv.at(keys.begin), out, more || p.moves);
  }

  // Scores of W queries become P, their tangents P (E - dlse), both in rows; hidden ones, and what fills up a step,
  // exactly 0.
  void weigh(const ColumnMask& mask, const ColumnSteps& steps, int64_t head, int64_t i) const {
    const float factor = __builtin_fabsf(p.a.scale);
    const int64_t row = scores.row, at = head * p.query_block + i;
    float *const score = scores.at(0, i).data, *const tangent = tangents.at(0, i).data;
    const vf lse = load(t.lse + at);
    TangentOfSum sum{p.moves ? mean_seen(mask, tangents.at(0, i)) : vf{}};
    steps.for_each_key(
        mask,
        [&](int64_t j, bool masked) __attribute__((always_inline)) {
          vf weight = exp2(load(score + j * row) * (factor * kLog2E) - lse);
          if (masked) weight = select(mask.sees(j), weight, vf{});
          store(score + j * row, weight);
          if (!p.moves) return sum.weights.add(j, weight);
          vf e = load(tangent + j * row);
          if (masked) {
            e = select(mask.sees(j), e, vf{});
            store(tangent + j * row, e);
          }
          sum.add(j, weight, e);
        },
        [&](int64_t j) {
          store(score + j * row, vf{});
          store(tangent + j * row, vf{});
        });
    const auto found = sum.find();
    const vf dlse = found.dlse, inverse = found.inverse;
    if (p.moves) store(t.dlse + at, dlse * factor);
    if (p.given.dv) {
      for (int64_t r = 0; r < steps.count; ++r)
        for (int64_t j = steps.runs[r].begin; j < steps.runs[r].end; j += 2)
          store_words(words.at(j, i).data,
                      pair(load(score + j * row) * inverse, load(score + (j + 1) * row) * inverse));
      transpose_weights(steps, i, words, weights);
    }
    if (!p.moves) return;
    const vf by = inverse * factor;
    vf rounded_sum = {};
    for (int64_t r = 0; r < steps.count; ++r)
      for (int64_t j = steps.runs[r].begin; j < steps.runs[r].end; j += 2) {
        vf term[2];
        for (int64_t key = 0; key < 2; ++key) {
          const int64_t k = (j + key) * row;
          term[key] = load(score + k) * ((load(tangent + k) - dlse) * by);
        }
        store_words(words.at(j, i).data, pair(term[0], term[1]));
        rounded_sum += as_bf16(term[0]) + as_bf16(term[1]);
      }
    transpose_weights(steps, i, words, moved);
    store(left + i, rounded_sum);
  }
};

}  // namespace

void temporal_attention_tangents(const TemporalTangents& a) {
  if (in_pairs(a.forward) && (a.dq || a.dk || a.dv)) {  // none: of a gate alone
    const int64_t queries = a.dq ? 2 : 1, keys = 2 + (a.dk ? 1 : 0) + (a.dv ? 1 : 0);
    const TemporalTangentsPlan plan(a, queries, keys, kStageHalves);
    if (plan.one_key_block()) return run_temporal<MatrixTangents>(plan);
  }
  VDCORE_REST::temporal_attention_tangents(a);
}

}  // namespace vdcore::cpu::VDCORE_ISA
