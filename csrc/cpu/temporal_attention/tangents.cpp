// Tangents of temporal attention, by the formula of frame attention's (frame_attention/tangents.cpp), with this room's
// tiles: a step is one position and some heads, whose rows are gathered at once while those of the next are fetched.
//
// With the tangent of q alone three products for forward's two, and six tensors of rows for its four: 1.5 times its
// time, by either count. Where all keys of a query are in one block, as of a usual video's frames they are, its dlse is
// known before the second product, which then takes P (E - dlse): forward's result is not read.
#include "cpu/temporal_attention/tangents_of_steps.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kStageFloats = 144 * 1024;  // rows of one step: with scores and their tangents, under 1 MB

class FloatTangents {
 public:
  using Plan = TemporalTangentsPlan;

  FloatTangents(const Plan& plan, Arena& arena) : p(plan), n(plan.shape), t(plan, arena) {
    const int64_t kv_heads = p.heads / n.group;
    const auto stage = [&](int64_t heads, int64_t frames) {
      return Stage{arena.floats(heads * frames * n.row), frames, n.row};
    };
    const auto tile = [&](int64_t rows) { return Tile{arena.floats(rows * p.query_block), p.query_block}; };
    q = stage(p.heads, p.query_block), dq = stage(p.heads, p.query_block);
    k = stage(kv_heads, p.key_block), dk = stage(kv_heads, p.key_block);
    v = stage(kv_heads, p.key_block), dv = stage(kv_heads, p.key_block);
    q_transposed = tile(n.row), dq_transposed = tile(n.row), weights = tile(p.key_block), moved = tile(p.key_block);
    for (float** x : {&shift, &counted, &mass}) *x = arena.floats(p.rows());
    for (Run** x : {&windows, &lows}) *x = reinterpret_cast<Run*>(arena.floats(p.query_block * sizeof(Run) / 4));
  }

  int64_t bytes_at_once() const {
    const TemporalTangents& a = p.given;
    return p.bytes_at_once(1 + (a.dq ? 1 : 0) + (a.dk ? 1 : 0), (p.moves ? 1 : 0) + (a.dv ? 1 : 0));
  }

  void run(const Place& place, Prefetch& prefetch) {
    for (int64_t i = 0; i < n.T; i += p.query_block) {
      const Run queries = {i, smaller(n.T, i + p.query_block)};
      load_queries(place, queries);
      const VisibleKeys visible = visible_keys(p.a, place.b, i);
      bool first = true;
      for (int64_t j = 0; j < n.K; j += p.key_block) {
        const Run keys = {j, smaller(n.K, j + p.key_block)};
        const SeenKeys seen(visible, queries.size(), j, keys.size());
        if (!seen.any()) continue;
        load_keys(place, seen, j);
        if (!visible.dense) key_runs(visible, queries.size(), j, keys.size(), windows, lows);
        for (int64_t h = 0; h < place.heads.count; ++h) attend(place, visible, h, queries, keys, first, prefetch);
        first = false;
      }
      if (first || !(p.moves || p.given.dv)) memset(t.out.data, 0, p.rows() * n.row * sizeof(float));
      for (int64_t h = 0; h < place.heads.count && !p.one_key_block(); ++h) take_mean_out(place, h, queries);
      t.write(p, place, queries);
    }
  }

 private:
  const Plan& p;
  const Shape& n;
  TemporalTangentResults t;
  Stage q, dq, k, dk, v, dv;
  Tile q_transposed, dq_transposed;
  Tile weights, moved;            // (key_block, query_block): scores and their tangents, then P and P (E - shift)
  float *shift, *counted, *mass;  // (heads, query_block): of results over several blocks of keys; the sum of P
  Run *windows, *lows;

  // Rows that are read once or twice are read where they lie, as in forward.
  bool keys_in_place(const TensorView& x) const { return p.one_query_block() && x.dtype == DType::f32; }
  bool queries_in_place() const { return p.one_query_block() && n.D % W == 0; }

  void load_queries(const Place& place, Run queries) const {
    const auto load_rows = [&](const TensorView& x, const Stage& to) {
      if (x && !queries_in_place()) gather(x, place.b, place.s, queries, place.heads, n.D, to, 0);
    };
    load_rows(p.a.q, q);
    load_rows(p.given.dq, dq);
    t.load_lse(p, place, queries);
    for (float* x : {shift, counted, mass}) memset(x, 0, p.rows() * sizeof(float));
  }

  void load_keys(const Place& place, const SeenKeys& seen, int64_t first_key) const {
    const TensorView* const from[] = {&p.a.k, &p.given.dk, &p.a.v, &p.given.dv};
    const bool gathered[] = {!keys_in_place(p.a.k), !keys_in_place(p.given.dk), true, true};
    const Stage* const to[] = {&k, &dk, &v, &dv};
    for (const Run& run : seen.runs)
      for (int i = 0; i < 4; ++i)
        if (*from[i] && gathered[i] && run.size())
          gather(*from[i], place.b, place.s, {first_key + run.begin, first_key + run.end}, place.kv_heads(n.group), n.D,
                 *to[i], run.begin);
  }

  // One head, one block of queries, one block of keys.
  void attend(const Place& place, const VisibleKeys& visible, int64_t head, Run queries, Run keys, bool first,
              Prefetch& prefetch) const {
    const int64_t kv_head = head / n.group, row = head * p.query_block;
    const auto transpose_of = [&](const TensorView& x, const Stage& stage, Tile to) {
      transpose_queries(p, x, queries_in_place(), stage, place, head, queries, to);
    };
    const auto keys_of = [&](const TensorView& x, const Stage& stage) {
      return keys_in_place(x) ? place.rows(x, keys.begin, place.kv_heads(n.group).first + kv_head)
                              : stage.head(kv_head);
    };
    const Tile from_k = keys_of(p.a.k, k);
    transpose_of(p.a.q, q, q_transposed);
    score_products(visible, queries.size(), keys.begin, keys.size(), n.D, from_k, q_transposed, weights, prefetch);
    add_bias(p.a, place.heads.first + head, keys, queries, weights);
    if (p.given.dq) {
      transpose_of(p.given.dq, dq, dq_transposed);
      score_products(visible, queries.size(), keys.begin, keys.size(), n.D, from_k, dq_transposed, moved, prefetch);
    }
    if (p.given.dbias) move_by_bias(place.heads.first + head, queries, keys);
    for (int64_t i = 0; i < queries.size(); i += W) {
      const ColumnMask mask(visible, i, queries.size(), keys.begin, keys.size());
      if (p.given.dk) move_by_keys(mask, keys_of(p.given.dk, dk), i, prefetch);
      if (p.one_key_block())
        weigh_all(mask, i, row + i);
      else
        weigh(mask, i, row + i);
    }
    const Tile out = t.out.head(head);
    if (p.moves) add(visible, moved, v.head(kv_head), out, queries.size(), keys.size(), !first, prefetch);
    if (p.given.dv)
      add(visible, weights, dv.head(kv_head), out, queries.size(), keys.size(), !first || p.moves, prefetch);
  }

  // The part of the scores' tangent that comes from the keys', for one vector of queries.
  void move_by_keys(const ColumnMask& mask, Tile keys, int64_t i, Prefetch& prefetch) const {
    for (const Run& run : mask.segments)
      if (run.size())
        product(run.size(), W, n.D, {keys.at(run.begin, 0).data, keys.row, 1}, q_transposed.at(0, i),
                moved.at(run.begin, i), p.given.dq || p.given.dbias, prefetch);
  }

  // And from the bias's.
  void move_by_bias(int64_t head, Run queries, Run keys) const {
    for (int64_t j = 0; j < keys.size(); ++j) {
      const float* from = p.given.dbias + bias_at(p.a, head, keys.begin + j) + queries.begin;
      for (int64_t i = 0; i < queries.size(); i += W) {
        float* at = moved.at(j, i).data;
        store(at, p.given.dq ? load(at) + load(from + i) : load(from + i));
      }
    }
  }

  // Scores become P, their tangents P (E - shift), for one vector of queries.
  void weigh(const ColumnMask& mask, int64_t i, int64_t at) const {
    const vf lse = load(t.lse + at);
    if (p.moves) find_shift(mask, i, at);
    const vf less = load(shift + at);
    KeySum sum, all;
    mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
      float *score = weights.at(j, i).data, *tangent = moved.at(j, i).data;
      vf weight = exp2(load(score) - lse);
      store(score, weight);
      if (masked) weight = select(mask.sees(j), weight, vf{});
      all.add(j, weight);
      if (!p.moves) return;
      vf term = weight * (load(tangent) * kLn2 - less);
      store(tangent, term);
      if (masked) term = select(mask.sees(j), term, vf{});
      sum.add(j, term);
    });
    sum.flush();
    all.flush();
    store(t.dlse + at, load(t.dlse + at) + sum.total);
    store(mass + at, load(mass + at) + all.total);
  }

  // The mean of E over the first block that a query sees.
  void find_shift(const ColumnMask& mask, int64_t i, int64_t at) const {
    const vf before = load(counted + at);
    vf total = {}, count = {};
    mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
      const vf e = load(moved.at(j, i).data);
      total += masked ? select(mask.sees(j), e, vf{}) : e;
      count += masked ? select(mask.sees(j), splat(1.f), vf{}) : splat(1.f);
    });
    store(shift + at, select(before == 0.f, total * kLn2 / max(count, splat(1.f)), load(shift + at)));
    store(counted + at, before + count);
  }

  // The same of queries all of whose keys are here: P over its sum, and times E - dlse.
  void weigh_all(const ColumnMask& mask, int64_t i, int64_t at) const {
    const vf lse = load(t.lse + at);
    TangentOfSum sum{p.moves ? mean_seen(mask, moved.at(0, i)) : vf{}};
    mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
      float* score = weights.at(j, i).data;
      vf weight = exp2(load(score) - lse), e = p.moves ? load(moved.at(j, i).data) : vf{};
      store(score, weight);
      if (masked) {
        const vi sees = mask.sees(j);
        weight = select(sees, weight, vf{});
        e = select(sees, e, vf{});
      }
      sum.add(j, weight, e);
    });
    const auto found = sum.find();
    const vf dlse = found.dlse, inverse = found.inverse;
    store(t.dlse + at, dlse * kLn2);
    mask.for_each_key([&](int64_t j, bool) __attribute__((always_inline)) {
      float *score = weights.at(j, i).data, *tangent = moved.at(j, i).data;
      const vf weight = load(score) * inverse;
      store(score, weight);
      if (p.moves) store(tangent, weight * ((load(tangent) - dlse) * kLn2));
    });
  }

  void add(const VisibleKeys& visible, Tile of_keys, Tile values, Tile out, int64_t queries, int64_t keys, bool more,
           Prefetch& prefetch) const {
    const Scalars left = {of_keys.data, 1, of_keys.row};
    if (visible.dense) return product(queries, n.row, keys, left, values, out, more, prefetch);
    product_over_runs(queries, n.row, windows, left, values, out, more, prefetch);
    product_over_runs(queries, n.row, lows, left, values, out, true, prefetch);
  }

  // Of results over several blocks of keys: dout less dlse out, but for what the shift has taken, over the sum of P.
  void take_mean_out(const Place& place, int64_t head, Run queries) const {
    float* const row = q_transposed.data;
    for (int64_t i = 0; i < queries.size(); ++i) {
      const int64_t at = head * p.query_block + i;
      const float inverse = mass[at] == 0 ? 0 : 1 / mass[at];
      with_dtype(p.a.out.dtype, [&](auto type) {
        read_row<decltype(type)::value>(p.a.out.at(place.b, queries.begin + i, place.s, place.heads.first + head), n.D,
                                        row);
      });
      const float sum = t.dlse[at];
      float* mine = t.out.head(head).at(i, 0).data;
      for (int64_t c = 0; c < n.row; c += W) store(mine + c, (load(mine + c) - sum * load(row + c)) * inverse);
      t.dlse[at] = mass[at] == 0 ? 0 : sum * inverse + shift[at];
    }
  }
};

}  // namespace

void temporal_attention_tangents(const TemporalTangents& a) {
  run_temporal<FloatTangents>(FloatTangents::Plan(a, 3, 4, kStageFloats));
}

}  // namespace vdcore::cpu::VDCORE_ISA
