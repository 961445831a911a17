// Temporal attention, backward: with P recomputed from lse and delta = rowsum(P * dP) - dlse,
//   dV = P^T dO,   dS = P * (dO V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q,
// then back through rope and norm. All keys of a head stay at hand, and queries come block by block. So delta need not
// be rowsum(dout * out), which errs by the rounding of out, and as much for all keys of a row: that error would reach
// dQ times the keys' mean. That of rowsum(P * dP) cancels in dP - delta.
#include <initializer_list>

#include "common/threads.h"
#include "cpu/qk_norm_rope/stage_norm_rope.h"
#include "cpu/temporal_attention/temporal_attention.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kMaxBlock = 128;
constexpr int64_t kBlockFloats = 16 * 1024;  // of one tensor's rows of one head
constexpr int64_t kScoreFloats = 32 * 1024;  // of the scores of a block
constexpr int64_t kStageFloats = 64 * 1024;  // rows and gradients of one step, in L2

struct Plan {
  const TemporalAttentionBackward& g;
  const TemporalAttention& a;
  Shape shape;
  int64_t query_block, heads, head_groups;
  bool one_block;     // of queries
  bool per_position;  // an item owns whole positions, all samples: their rope table rows get one writer
  int64_t units;      // (sample, position) pairs, or positions

  explicit Plan(const TemporalAttentionBackward& args) : g(args), a(args.forward), shape(args.forward) {
    const Shape& n = shape;
    const int64_t block = smaller(kMaxBlock, smaller(kBlockFloats / n.row, kScoreFloats / n.K) / W * W);
    query_block = smaller(round_up(n.T), larger(W, block));
    one_block = query_block >= n.T;
    heads = n.H;
    const int64_t floats = 3 * query_block * n.row * n.group + 4 * n.K * n.row;  // of one group
    // A norm over all heads mixes their gradients: they stay together.
    while (!a.norm.over_all && heads > n.group && heads / n.group * floats > kStageFloats) heads = n.fewer_heads(heads);
    head_groups = n.H / heads;
    per_position = static_cast<bool>(g.dcos) && g.dcos.size[1] > 1;
    units = per_position ? n.S : n.B * n.S;
  }
};

struct Tiles {
  Stage q, dout, dq, k, v, dk, dv;
  Tile q_transposed, dout_transposed, p, ds;
  float *lse, *delta;  // (heads, query_block); lse in base 2
  float* buffer;       // four rows
  float* weight_sums[4];
  Run *windows, *lows, *seen_by, *also_seen_by;
  StageNormRope norm_rope;

  Tiles(const Plan& plan, Arena& arena) : norm_rope(plan.a, plan.shape.row, arena) {
    const Shape& n = plan.shape;
    const int64_t row = n.row, kv_heads = plan.heads / n.group, Q = plan.query_block, K = n.K;
    for (Stage* stage : {&q, &dout, &dq}) *stage = {arena.floats(plan.heads * Q * row), Q, row};
    for (Stage* stage : {&k, &v, &dk, &dv}) *stage = {arena.floats(kv_heads * K * row), K, row};
    for (Tile* tile : {&q_transposed, &dout_transposed}) *tile = {arena.floats(row * Q), Q};
    for (Tile* tile : {&p, &ds}) *tile = {arena.floats(K * Q), Q};
    lse = arena.floats(plan.heads * Q);
    delta = arena.floats(plan.heads * Q);
    buffer = arena.floats(4 * row);
    for (float*& sum : weight_sums) sum = arena.floats(row);
    for (Run** runs : {&windows, &lows}) *runs = reinterpret_cast<Run*>(arena.floats(Q * sizeof(Run) / 4));
    for (Run** runs : {&seen_by, &also_seen_by}) *runs = reinterpret_cast<Run*>(arena.floats(K * sizeof(Run) / 4));
  }
};

class Backward {
 public:
  // `item`: whose partial sums are added to.
  Backward(const Plan& plan, const Tiles& tiles, const Place& place, int64_t item, Prefetch& prefetch)
      : p(plan),
        n(plan.shape),
        a(plan.a),
        g(plan.g),
        t(tiles),
        at(place),
        item(item),
        prefetch(prefetch),
        kv_heads(place.kv_heads(plan.shape.group)) {}

  void run() {
    load_keys();
    if (!p.one_block) clear(t.dk), clear(t.dv);
    for (int64_t q = 0; q < n.T; q += p.query_block) {
      const Run queries = {q, smaller(n.T, q + p.query_block)};
      load_queries(queries);
      accumulate(queries);
      finish_queries(queries);
    }
    finish_keys();
  }

 private:
  const Plan& p;
  const Shape& n;
  const TemporalAttention& a;
  const TemporalAttentionBackward& g;
  const Tiles& t;
  const Place& at;
  const int64_t item;
  Prefetch& prefetch;
  const HeadRange kv_heads;

  void clear(Stage stage) const { memset(stage.data, 0, kv_heads.count * stage.frames * stage.row * 4); }

  Run seen_by(int64_t key) const {
    const VisibleFrames& v = a.visible;
    if (v.dense) return {0, n.T};
    const int64_t i = (v.per_sample ? at.b * n.K : 0) + key;
    return {v.seen_begin[i], v.seen_end[i]};
  }
  Run also_seen_by(int64_t key) const {
    const VisibleFrames& v = a.visible;
    if (!v.twice) return {};
    const int64_t i = (v.per_sample ? at.b * n.K : 0) + key;
    return {v.also_begin[i], v.also_end[i]};
  }
  bool sees_any(int64_t query) const {
    const VisibleKeys v = visible_keys(a, at.b, query);
    return v.dense ? n.K > 0 : v.end[0] > v.begin[0] || v.low_end[0] > v.low_begin[0];
  }

  void load_queries(Run queries) {
    gather(a.q, at.b, at.s, queries, at.heads, n.D, t.q, 0);
    t.norm_rope.queries(a, at.b, at.s, queries, at.heads, t.q);
    gather(g.dout, at.b, at.s, queries, at.heads, n.D, t.dout, 0);
    for (int64_t h = 0; h < at.heads.count; ++h)
      for (int64_t i = 0; i < p.query_block; ++i) {
        float *lse = t.lse + h * p.query_block + i, *delta = t.delta + h * p.query_block + i;
        *lse = *delta = 0;
        if (i >= queries.size()) continue;
        const int64_t frame = queries.begin + i, head = at.heads.first + h;
        *lse = *reinterpret_cast<const float*>(a.lse.at(at.b, frame, at.s, head)) * kLog2E;
        if (*lse == -kInf) *lse = kInf;  // sees nothing: exp2(score - inf) is 0
        if (g.dlse) *delta = -*reinterpret_cast<const float*>(g.dlse.at(at.b, frame, at.s, head));
      }
  }

  void load_keys() {
    const Run keys = {0, n.K};
    gather(a.k, at.b, at.s, keys, kv_heads, n.D, t.k, 0);
    t.norm_rope.keys(a, at.b, at.s, keys, kv_heads, t.k, 0);
    gather(a.v, at.b, at.s, keys, kv_heads, n.D, t.v, 0);
  }

  // One column of scores becomes P, and one of dP becomes dS.
  void score_gradients(const ColumnMask& mask, Tile weights, Tile gradients, vf lse, vf minus_dlse) const {
    KeySum sum, weighted;
    mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
      float* at = weights.at(j, 0).data;
      vf weight = exp2(load(at) - lse), product = weight * load(gradients.at(j, 0).data);
      if (masked) {
        const vi sees = mask.sees(j);
        weight = select(sees, weight, vf{});
        product = select(sees, product, vf{});
      }
      store(at, weight);
      sum.add(j, weight);
      weighted.add(j, product);
    });
    const RowGradients row(sum, weighted, minus_dlse);
    mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
      float *p_at = weights.at(j, 0).data, *ds_at = gradients.at(j, 0).data;
      vf weight = load(p_at), ds = load(ds_at);
      row.apply(weight, ds);
      store(p_at, weight);
      store(ds_at, masked ? select(mask.sees(j), ds, vf{}) : ds);
    });
  }

  void add_bias_gradient(const ColumnMask& mask, int64_t head, int64_t query, Tile ds) const {
    float* sums = g.dbias + item * a.bias_heads * n.K * a.bias_row + query;
    mask.for_each_key([&](int64_t j, bool) __attribute__((always_inline)) {
      float* to = sums + bias_at(a, head, j);
      store(to, load(to) + load(ds.at(j, 0).data));
    });
  }

  // Sets dq of a block of queries, and sets or adds what they give to dk and dv.
  void accumulate(Run queries) {
    const VisibleKeys visible = visible_keys(a, at.b, queries.begin);
    const int64_t Q = queries.size(), K = n.K;
    // Keys that nobody in the block sees are left alone: most of them where windows are small.
    const SeenKeys seen = p.one_block ? SeenKeys(K) : SeenKeys(visible, Q, 0, K);
    if (!visible.dense) {
      key_runs(visible, Q, 0, K, t.windows, t.lows);
      for (const Run& keys : seen.runs)
        for (int64_t j = keys.begin; j < keys.end; ++j) {
          const auto of_block = [&](Run run) {
            return intersect({run.begin - queries.begin, run.end - queries.begin}, {0, Q});
          };
          t.seen_by[j] = of_block(seen_by(j));
          t.also_seen_by[j] = of_block(also_seen_by(j));
        }
    }
    for (int64_t h = 0; h < at.heads.count; ++h) {
      const int64_t kv = h / n.group;
      const bool add = !p.one_block || h % n.group > 0;
      const Tile q = t.q.head(h), dout = t.dout.head(h), k = t.k.head(kv), v = t.v.head(kv);
      transpose(Q, n.D, q, a.scale * kLog2E, t.q_transposed);
      transpose(Q, n.D, dout, 1.f, t.dout_transposed);
      score_products(visible, Q, 0, K, n.D, k, t.q_transposed, t.p, prefetch);
      add_bias(a, at.heads.first + h, {0, K}, queries, t.p);
      score_products(visible, Q, 0, K, n.D, v, t.dout_transposed, t.ds, prefetch);
      for (int64_t i = 0; i < Q; i += W) {
        const int64_t row = h * p.query_block + i;
        const ColumnMask mask(visible, i, Q, 0, K);
        score_gradients(mask, t.p.at(0, i), t.ds.at(0, i), load(t.lse + row), load(t.delta + row));
        if (g.dbias) add_bias_gradient(mask, at.heads.first + h, queries.begin + i, t.ds.at(0, i));
      }
      if (g.dk || g.dv)
        for (const Run& keys : seen.runs) {
          if (!keys.size()) continue;
          const int64_t j = keys.begin;
          const Scalars weights = {t.p.at(j, 0).data, t.p.row, 1}, ds = {t.ds.at(j, 0).data, t.ds.row, 1};
          const Tile dv = t.dv.head(kv).at(j, 0), dk = t.dk.head(kv).at(j, 0);
          if (visible.dense) {
            product(keys.size(), n.row, Q, weights, dout, dv, add, prefetch);
            product(keys.size(), n.row, Q, ds, q, dk, add, prefetch);
          } else {
            product_over_runs(keys.size(), n.row, t.seen_by + j, weights, dout, dv, add, prefetch);
            product_over_runs(keys.size(), n.row, t.seen_by + j, ds, q, dk, add, prefetch);
            if (!a.visible.twice) continue;
            product_over_runs(keys.size(), n.row, t.also_seen_by + j, weights, dout, dv, true, prefetch);
            product_over_runs(keys.size(), n.row, t.also_seen_by + j, ds, q, dk, true, prefetch);
          }
        }
      if (!g.dq) continue;
      const Scalars ds_transposed = {t.ds.data, 1, t.ds.row};
      if (visible.dense) {
        product(Q, n.row, K, ds_transposed, k, t.dq.head(h), false, prefetch);
      } else {
        product_over_runs(Q, n.row, t.windows, ds_transposed, k, t.dq.head(h), false, prefetch);
        product_over_runs(Q, n.row, t.lows, ds_transposed, k, t.dq.head(h), true, prefetch);
      }
    }
  }

  void finish_queries(Run queries) {
    if (!g.dq) return;
    through_norm_rope(query_side(a), a.q, queries, at.heads, t.dq, g.dq_weight, g.dq_bias,
                      [&](int64_t frame) { return sees_any(frame); });
    write(g.dq, queries, at.heads, t.dq, transformed(a) ? 1.f : a.scale);
  }
  void finish_keys() {
    const Run keys = {0, n.K};
    if (g.dv) write(g.dv, keys, kv_heads, t.dv, 1.f);
    if (!g.dk) return;
    through_norm_rope(key_side(a), a.k, keys, kv_heads, t.dk, g.dk_weight, g.dk_bias,
                      [&](int64_t frame) { return seen_by(frame).size() + also_seen_by(frame).size() > 0; });
    write(g.dk, keys, kv_heads, t.dk, transformed(a) ? 1.f : a.scale);
  }

  void write(const TensorView& x, Run frames, HeadRange heads, Stage stage, float factor) {
    const bool stream = streams(x);
    with_dtype(x.dtype, [&](auto type) {
      for (int64_t f = frames.begin; f < frames.end; ++f)
        for (int64_t h = 0; h < heads.count; ++h) {
          char* row = x.at(at.b, f, at.s, heads.first + h);
          const float* in = stage.head(h).at(f - frames.begin, 0).data;
          if (stream)
            stream_row<decltype(type)::value>(row, n.D, in, factor);
          else
            write_row<decltype(type)::value>(row, n.D, in, factor);
        }
    });
  }

  // Gradient rows with respect to normed and rotated q or k, times scale, back to raw q or k, in place. A row that
  // takes no part is left out of the sums: its values may be anything.
  template <typename Live>
  void through_norm_rope(const Side& side, const TensorView& x, Run frames, HeadRange heads, Stage grad, float* dweight,
                         float* dbias, const Live& live) {
    if (!transformed(a)) return;
    const bool norm = a.norm.kind != NormKind::none, over_all = a.norm.over_all;
    const int64_t pairs = a.rope.style == RopeStyle::none ? 0 : a.rope.cos.size[3];
    const int64_t width = over_all ? x.size[3] * n.D : n.D;  // of a weight
    if (dweight) dweight += item * width;
    if (dbias) dbias += item * width;
    // Sums of this step first, then into the item's: shorter chains of additions.
    float *local_weight = dweight, *local_bias = dbias;
    if (!over_all) {
      if (dweight) memset(local_weight = t.weight_sums[0], 0, n.row * 4);
      if (dbias) memset(local_bias = t.weight_sums[1], 0, n.row * 4);
    }
    float *raw = t.buffer, *cos_row = t.buffer + n.row, *sin_row = t.buffer + 2 * n.row, *normed = t.buffer + 3 * n.row;
    for (int64_t f = frames.begin; f < frames.end; ++f) {
      const bool alive = live(f);
      Moments moments;
      NormSums token_sums;
      if (norm && over_all && alive) moments = token_moments(a.norm, x, at.b, f, at.s, x.size[3], n.D, raw);
      for (int64_t h = 0; h < heads.count; ++h) {
        float* d = grad.head(h).at(f - frames.begin, 0).data;
        for (int64_t c = 0; c < n.row; c += W) store(d + c, load(d + c) * a.scale);
        if (!alive) continue;
        const int64_t head = heads.first + h, w = over_all ? head * n.D : 0;
        const float *weight = side.weight ? side.weight + w : nullptr, *bias = side.bias ? side.bias + w : nullptr;
        if (norm || g.dcos) {
          gather(x, at.b, at.s, {f, f + 1}, {head, 1}, n.D, {raw, 1, n.row}, 0);
          if (norm && !over_all) moments = row_moments(a.norm, raw, n.D);
        }
        if (pairs) {
          const int64_t row = side.first_frame + f;
          if (g.dcos) {
            memcpy(normed, raw, n.row * 4);
            if (norm) normalize(normed, n.D, moments, weight, bias);
            rotate_table_gradient(normed, d, pairs, a.rope.style, table_gradient(g.dcos, row, head),
                                  table_gradient(g.dsin, row, head));
          }
          rotate(d, pairs, a.rope.style, table_row(a.rope.cos, row, at.s, head, cos_row),
                 table_row(a.rope.sin, row, at.s, head, sin_row), -1.f);
        }
        if (!norm) continue;
        const NormSums sums = norm_gradient_sums(raw, d, n.D, moments, weight);
        if (over_all) {
          token_sums.dy += sums.dy;
          token_sums.dy_x += sums.dy_x;
        } else {
          norm_gradient(a.norm, raw, d, n.D, moments, weight, sums, n.D, local_weight, local_bias);
        }
      }
      if (!(norm && over_all && alive)) continue;
      for (int64_t h = 0; h < heads.count; ++h) {
        const int64_t w = (heads.first + h) * n.D;
        gather(x, at.b, at.s, {f, f + 1}, {heads.first + h, 1}, n.D, {raw, 1, n.row}, 0);
        norm_gradient(a.norm, raw, grad.head(h).at(f - frames.begin, 0).data, n.D, moments,
                      side.weight ? side.weight + w : nullptr, token_sums, x.size[3] * n.D,
                      local_weight ? local_weight + w : nullptr, local_bias ? local_bias + w : nullptr);
      }
    }
    if (over_all) return;
    for (int64_t c = 0; c < n.D; ++c) {
      if (dweight) dweight[c] += local_weight[c];
      if (dbias) dbias[c] += local_bias[c];
    }
  }

  float* table_gradient(const TensorView& table, int64_t row, int64_t head) const {
    return reinterpret_cast<float*>(table.at(row, at.s, head)) + (p.per_position ? 0 : item * g.table_item_stride);
  }
};

void run_item(const Plan& p, int64_t item) {
  const Shape& n = p.shape;
  Arena count(nullptr);
  Tiles(p, count);
  Arena arena(scratch(count.used()));
  const Tiles tiles(p, arena);

  const int64_t per_item = (p.units + p.g.items - 1) / p.g.items;
  const int64_t samples = p.per_position ? n.B : 1;
  const int64_t first = item * per_item, steps = (smaller(p.units, first + per_item) - first) * samples * p.head_groups;
  const auto place = [&](int64_t i) -> Place {
    const int64_t unit = first + i / p.head_groups / samples, group = i % p.head_groups;
    const HeadRange heads = {group * p.heads, p.heads};
    if (p.per_position) return {i / p.head_groups % samples, unit, heads};
    return {unit / n.S, unit % n.S, heads};
  };

  const TensorView* const tensors[] = {&p.a.q, &p.g.dout, &p.a.k, &p.a.v};
  const int64_t bytes = (2 * n.T * n.H + 2 * n.K * n.G) * n.D * size_of(p.a.q.dtype);
  const int64_t panels = (n.row / W + 2) / 3, lanes = (round_up(n.T) / W + 2) / 3;
  const auto blocks = [](int64_t rows, int vectors) { return (rows + block_rows(vectors) - 1) / block_rows(vectors); };
  const int64_t product_steps =
      2 * blocks(n.K, 2) * lanes * n.D + (2 * blocks(n.K, 3) * n.T + blocks(n.T, 3) * n.K) * panels;
  for (int64_t i = 0; i < steps; ++i) {
    const Place now = place(i), then = place(i + 1);
    NextRows next{tensors, 4, then.b, then.s, then.heads.first, then.heads.count};
    Prefetch prefetch;
    if (i + 1 < steps && p.one_block) {
      prefetch.source = NextRows::next;
      prefetch.context = &next;
      prefetch.stride = smaller(64, larger(1, bytes / larger(1, product_steps * n.H)));
    }
    Backward(p, tiles, now, item, prefetch).run();
  }
  stream_fence();
}

}  // namespace

void temporal_attention_backward(const TemporalAttentionBackward& g) {
  Plan plan(g);
  parallel_for(
      g.items, g.forward.threads, [](void* p, int64_t item) { run_item(*static_cast<const Plan*>(p), item); }, &plan);
}

}  // namespace vdcore::cpu::VDCORE_ISA
