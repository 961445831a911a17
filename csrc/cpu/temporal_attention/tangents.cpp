// Tangents of temporal attention, by the formula of frame attention's (frame_attention/tangents.cpp), with this room's
// tiles: a step is one position and some heads, whose rows are gathered at once while those of the next are fetched.
//
// With the tangent of q alone three products for forward's two, and six tensors of rows for its four: 1.5 times its
// time, by either count. Where all keys of a query are in one block, as of a usual video's frames they are, its dlse is
// known before the second product, which then takes P (E - dlse): forward's result is not read.
#include "cpu/temporal_attention/tangents.h"

#include "common/threads.h"
#include "cpu/temporal_attention/tiles.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kMaxQueryBlock = 64;
constexpr int64_t kStageFloats = 144 * 1024;  // rows of one step: with scores and their tangents, under 1 MB

struct Plan {
  const TemporalTangents& a;
  const TemporalAttention& f;
  Shape shape;
  bool moves;                      // the scores have a tangent
  int64_t query_block, key_block;  // frames
  int64_t heads;                   // query heads of one step
  int64_t positions;               // of one item
  int64_t chunks, head_groups;
  bool one_query_block, one_key_block, stream;

  explicit Plan(const TemporalTangents& args)
      : a(args), f(args.forward), shape(args.forward), moves(args.dq || args.dk || args.dbias) {
    const Shape& n = shape;
    query_block = smaller(round_up(n.T), kMaxQueryBlock);
    heads = n.H;
    const int64_t query_rows = 3 * query_block * n.row, key_row = 4 * n.row;
    while (heads > n.group && heads * query_rows + heads / n.group * n.K * key_row > kStageFloats)
      heads = n.fewer_heads(heads);
    const int64_t left = larger(kStageFloats - heads * query_rows, W * key_row);
    key_block = smaller(n.K, larger(left / (heads / n.group * key_row), 1));
    head_groups = n.H / heads;
    positions = larger(1, smaller(64, n.B * n.S / (8 * f.threads)));
    chunks = (n.S + positions - 1) / positions;
    one_query_block = query_block >= n.T;
    one_key_block = key_block >= n.K;
    stream = streams(a.dout);
  }
  int64_t items() const { return shape.B * chunks * head_groups; }
  // Rows that are read once or twice are read where they lie, as in forward.
  bool keys_in_place(const TensorView& x) const { return one_query_block && x.dtype == DType::f32; }
  bool queries_in_place(const TensorView& x) const { return keys_in_place(x) && shape.D % W == 0; }
  int64_t rows() const { return heads * query_block; }  // of one step
};

struct Tiles {
  Stage q, dq, out, k, dk, v, dv;
  Tile q_transposed, dq_transposed, p, e;
  float *lse, *shift, *counted, *sum;  // (heads, query_block)
  Run *windows, *lows;

  Tiles(const Plan& n, Arena& arena) {
    const int64_t row = n.shape.row, kv_heads = n.heads / n.shape.group;
    const auto stage = [&](int64_t heads, int64_t frames) {
      return Stage{arena.floats(heads * frames * row), frames, row};
    };
    const auto tile = [&](int64_t rows) { return Tile{arena.floats(rows * n.query_block), n.query_block}; };
    q = stage(n.heads, n.query_block), dq = stage(n.heads, n.query_block), out = stage(n.heads, n.query_block);
    k = stage(kv_heads, n.key_block), dk = stage(kv_heads, n.key_block);
    v = stage(kv_heads, n.key_block), dv = stage(kv_heads, n.key_block);
    q_transposed = tile(row), dq_transposed = tile(row), p = tile(n.key_block), e = tile(n.key_block);
    lse = arena.floats(4 * n.rows());
    shift = lse + n.rows(), counted = shift + n.rows(), sum = counted + n.rows();
    windows = reinterpret_cast<Run*>(arena.floats(n.query_block * sizeof(Run) / 4));
    lows = reinterpret_cast<Run*>(arena.floats(n.query_block * sizeof(Run) / 4));
  }
};

class Step {
 public:
  Step(const Plan& plan, const Tiles& tiles, const Place& place, Prefetch& prefetch)
      : p(plan), t(tiles), n(plan.shape), place(place), kv(place.kv_heads(plan.shape.group)), prefetch(prefetch) {}

  void run() {
    for (int64_t i = 0; i < n.T; i += p.query_block) {
      const Run queries = {i, smaller(n.T, i + p.query_block)};
      load_queries(queries);
      const VisibleKeys visible = visible_keys(p.f, place.b, i);
      first = true;
      for (int64_t j = 0; j < n.K; j += p.key_block) {
        const Run keys = {j, smaller(n.K, j + p.key_block)};
        const SeenKeys seen(visible, queries.size(), j, keys.size());
        if (!seen.any()) continue;
        load_keys(seen, j);
        if (!visible.dense) key_runs(visible, queries.size(), j, keys.size(), t.windows, t.lows);
        for (int64_t h = 0; h < place.heads.count; ++h) attend(visible, h, queries, keys);
        first = false;
      }
      if (first || !(p.moves || p.a.dv)) memset(t.out.data, 0, p.rows() * n.row * sizeof(float));
      with_dtype(p.a.dout.dtype, [&](auto type) { finish<decltype(type)::value>(queries); });
    }
  }

 private:
  const Plan& p;
  const Tiles& t;
  const Shape& n;
  const Place place;
  const HeadRange kv;
  Prefetch& prefetch;
  bool first = true;  // no keys yet

  void load_queries(Run queries) {
    const auto load_rows = [&](const TensorView& x, const Stage& to) {
      if (x && !p.queries_in_place(x)) gather(x, place.b, place.s, queries, place.heads, n.D, to, 0);
    };
    load_rows(p.f.q, t.q);
    load_rows(p.a.dq, t.dq);
    memset(t.lse, 0, 4 * p.rows() * sizeof(float));  // and what follows it
    for (int64_t i = 0; i < queries.size(); ++i)
      for (int64_t h = 0; h < place.heads.count; ++h) {
        const char* at = p.f.lse.at(place.b, queries.begin + i, place.s, place.heads.first + h);
        const float lse = *reinterpret_cast<const float*>(at);
        if (lse != -kInf) t.lse[h * p.query_block + i] = lse * kLog2E;  // else 0: exp2(-inf - 0) is 0, not NaN
      }
  }

  void load_keys(const SeenKeys& seen, int64_t first_key) {
    const TensorView* const from[] = {&p.f.k, &p.a.dk, &p.f.v, &p.a.dv};
    const bool gathered[] = {!p.keys_in_place(p.f.k), !p.keys_in_place(p.a.dk), true, true};
    const Stage* const to[] = {&t.k, &t.dk, &t.v, &t.dv};
    for (const Run& run : seen.runs)
      for (int i = 0; i < 4; ++i)
        if (*from[i] && gathered[i] && run.size())
          gather(*from[i], place.b, place.s, {first_key + run.begin, first_key + run.end}, kv, n.D, *to[i], run.begin);
  }

  // One head, one block of queries, one block of keys.
  void attend(const VisibleKeys& visible, int64_t head, Run queries, Run keys) {
    const int64_t kv_head = head / n.group, row = head * p.query_block;
    const float scale = p.f.scale * kLog2E;
    const auto queries_of = [&](const TensorView& x, const Stage& stage) {
      return p.queries_in_place(x) ? place.rows(x, queries.begin, place.heads.first + head) : stage.head(head);
    };
    const auto keys_of = [&](const TensorView& x, const Stage& stage) {
      return p.keys_in_place(x) ? place.rows(x, keys.begin, kv.first + kv_head) : stage.head(kv_head);
    };
    const Tile k = keys_of(p.f.k, t.k);
    transpose(queries.size(), n.D, queries_of(p.f.q, t.q), scale, t.q_transposed);
    score_products(visible, queries.size(), keys.begin, keys.size(), n.D, k, t.q_transposed, t.p, prefetch);
    add_bias(p.f, place.heads.first + head, keys, queries, t.p);
    if (p.a.dq) {
      transpose(queries.size(), n.D, queries_of(p.a.dq, t.dq), scale, t.dq_transposed);
      score_products(visible, queries.size(), keys.begin, keys.size(), n.D, k, t.dq_transposed, t.e, prefetch);
    }
    if (p.a.dbias) move_by_bias(place.heads.first + head, queries, keys);
    for (int64_t i = 0; i < queries.size(); i += W) {
      const ColumnMask mask(visible, i, queries.size(), keys.begin, keys.size());
      if (p.a.dk) move_by_keys(mask, keys_of(p.a.dk, t.dk), i);
      if (p.moves && p.one_key_block)
        weigh_all(mask, i, row + i);
      else
        weigh(mask, i, row + i);
    }
    const Tile out = t.out.head(head);
    if (p.moves) add(visible, t.e, t.v.head(kv_head), out, queries.size(), keys.size(), !first);
    if (p.a.dv) add(visible, t.p, t.dv.head(kv_head), out, queries.size(), keys.size(), !first || p.moves);
  }

  // The part of the scores' tangent that comes from the keys', for one vector of queries.
  void move_by_keys(const ColumnMask& mask, Tile dk, int64_t i) {
    for (const Run& run : mask.segments)
      if (run.size())
        product(run.size(), W, n.D, {dk.at(run.begin, 0).data, dk.row, 1}, t.q_transposed.at(0, i),
                t.e.at(run.begin, i), p.a.dq || p.a.dbias, prefetch);
  }

  // And from the bias's.
  void move_by_bias(int64_t head, Run queries, Run keys) const {
    for (int64_t j = 0; j < keys.size(); ++j) {
      const float* from = p.a.dbias + bias_at(p.f, head, keys.begin + j) + queries.begin;
      for (int64_t i = 0; i < queries.size(); i += W) {
        float* at = t.e.at(j, i).data;
        store(at, p.a.dq ? load(at) + load(from + i) : load(from + i));
      }
    }
  }

  // Scores become P, their tangents P (E - shift), for one vector of queries.
  void weigh(const ColumnMask& mask, int64_t i, int64_t at) {
    const vf lse = load(t.lse + at);
    if (!p.moves) {
      mask.for_each_key([&](int64_t j, bool) __attribute__((always_inline)) {
        float* score = t.p.at(j, i).data;
        store(score, exp2(load(score) - lse));
      });
      return;
    }
    const vf counted = load(t.counted + at);
    vf total = {}, count = {};
    mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
      const vf e = load(t.e.at(j, i).data);
      total += masked ? select(mask.sees(j), e, vf{}) : e;
      count += masked ? select(mask.sees(j), splat(1.f), vf{}) : splat(1.f);
    });
    const vf mean = total * kLn2 / max(count, splat(1.f));
    const vf shift = select(counted == 0.f, mean, load(t.shift + at));  // of the first block that a query sees
    store(t.shift + at, shift);
    store(t.counted + at, counted + count);
    KeySum sum;
    mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
      float *score = t.p.at(j, i).data, *tangent = t.e.at(j, i).data;
      const vf weight = exp2(load(score) - lse);
      vf moved = weight * (load(tangent) * kLn2 - shift);
      store(score, weight);
      store(tangent, moved);
      if (masked) moved = select(mask.sees(j), moved, vf{});
      sum.add(j, moved);
    });
    sum.flush();
    store(t.sum + at, load(t.sum + at) + sum.total);
  }

  // The same of queries all of whose keys are here: P (E - dlse). Less a guess, E's mean, so that dlse does not have
  // the error of a sum of P that is not quite 1, and a query with one key gets 0 exactly.
  void weigh_all(const ColumnMask& mask, int64_t i, int64_t at) {
    const vf lse = load(t.lse + at), guess = mean_tangent(mask, i);
    KeySum sum;
    mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
      float* score = t.p.at(j, i).data;
      const vf weight = exp2(load(score) - lse);
      vf moved = weight * (load(t.e.at(j, i).data) - guess);
      store(score, weight);
      if (masked) moved = select(mask.sees(j), moved, vf{});
      sum.add(j, moved);
    });
    sum.flush();
    const vf dlse = sum.total + guess;
    store(t.sum + at, dlse * kLn2);
    mask.for_each_key([&](int64_t j, bool) __attribute__((always_inline)) {
      float* tangent = t.e.at(j, i).data;
      store(tangent, load(t.p.at(j, i).data) * ((load(tangent) - dlse) * kLn2));
    });
  }

  // Over the keys that a query sees, in base 2; 0 where it sees none.
  vf mean_tangent(const ColumnMask& mask, int64_t i) const {
    vf total = {}, count = {};
    mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
      const vf e = load(t.e.at(j, i).data);
      total += masked ? select(mask.sees(j), e, vf{}) : e;
      count += masked ? select(mask.sees(j), splat(1.f), vf{}) : splat(1.f);
    });
    return total / max(count, splat(1.f));
  }

  void add(const VisibleKeys& visible, Tile weights, Tile values, Tile out, int64_t queries, int64_t keys, bool more) {
    const Scalars left = {weights.data, 1, weights.row};
    if (visible.dense) return product(queries, n.row, keys, left, values, out, more, prefetch);
    product_over_runs(queries, n.row, t.windows, left, values, out, more, prefetch);
    product_over_runs(queries, n.row, t.lows, left, values, out, true, prefetch);
  }

  template <DType T>
  void finish(Run queries) {
    float* const row = t.q_transposed.data;
    for (int64_t i = queries.begin; i < queries.end; ++i)
      for (int64_t h = 0; h < place.heads.count; ++h) {
        const int64_t at = h * p.query_block + i - queries.begin, head = place.heads.first + h;
        float* mine = t.out.head(h).at(i - queries.begin, 0).data;
        if (p.moves && t.counted[at] != 0) {  // of several blocks of keys
          read_row<T>(p.f.out.at(place.b, i, place.s, head), n.D, row);
          const vf sum = splat(t.sum[at]);
          for (int64_t c = 0; c < n.row; c += W) store(mine + c, load(mine + c) - sum * load(row + c));
        }
        if (p.stream)
          stream_row<T>(p.a.dout.at(place.b, i, place.s, head), n.D, mine, 1);
        else
          write_row<T>(p.a.dout.at(place.b, i, place.s, head), n.D, mine, 1);
        *reinterpret_cast<float*>(p.a.dlse.at(place.b, i, place.s, head)) = t.sum[at] + t.shift[at];
      }
  }
};

void run_item(const Plan& p, int64_t item) {
  const Shape& n = p.shape;
  Arena count(nullptr);
  Tiles(p, count);
  Arena arena(scratch(count.used()));
  const Tiles tiles(p, arena);

  const int64_t group = item % p.head_groups;
  item /= p.head_groups;
  const int64_t b = item / p.chunks, first = item % p.chunks * p.positions, steps = smaller(p.positions, n.S - first);
  const HeadRange heads = {group * p.heads, p.heads};

  const TensorView* const all[] = {&p.f.q, &p.f.k, &p.f.v, &p.a.dq, &p.a.dk, &p.a.dv};
  const TensorView* tensors[6];
  int present = 0;
  int64_t bytes = 0;
  for (const TensorView* x : all)
    if (*x) {
      tensors[present++] = x;
      bytes += x->size[1] * p.heads * x->size[3] / n.H * n.D * size_of(x->dtype);
    }
  // Steps that the products of one head take: scores and their tangents, then results.
  const int64_t scores = (n.K + block_rows(2) - 1) / block_rows(2) * ((round_up(n.T) / W + 2) / 3) * n.D,
                results = (n.T + block_rows(3) - 1) / block_rows(3) * ((n.row / W + 2) / 3) * n.K,
                products = scores * (1 + (p.a.dq ? 1 : 0) + (p.a.dk ? 1 : 0)) +
                           results * ((p.moves ? 1 : 0) + (p.a.dv ? 1 : 0));
  for (int64_t i = 0; i < steps; ++i) {
    NextRows next{tensors, present, b, first + i + 1, heads.first, heads.count};
    Prefetch prefetch;
    if (i + 1 < steps && p.key_block >= n.K && p.query_block >= n.T) {
      prefetch.source = NextRows::next;
      prefetch.context = &next;
      prefetch.stride = smaller(64, larger(1, bytes / larger(1, products * p.heads)));
    }
    Step(p, tiles, {b, first + i, heads}, prefetch).run();
  }
  stream_fence();
}

}  // namespace

void temporal_attention_tangents(const TemporalTangents& a) {
  Plan plan(a);
  parallel_for(
      plan.items(), a.forward.threads, [](void* p, int64_t item) { run_item(*static_cast<const Plan*>(p), item); },
      &plan);
}

}  // namespace vdcore::cpu::VDCORE_ISA
