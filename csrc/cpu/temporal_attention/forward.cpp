// Temporal attention, forward: the token at one position attends to the same position in the frames that its frame
// sees.
//
// Sequences are tiny (8 to 128 frames) and there are very many, so a head's whole problem lives in L1 and L2 and the
// work is to feed it: see temporal_tiles.h. Longer sequences go block by block with the online softmax.
#include "common/threads.h"
#include "cpu/qk_norm_rope/stage_norm_rope.h"
#include "cpu/temporal_attention/temporal_attention.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kMaxQueryBlock = 64;
constexpr int64_t kStageFloats = 112 * 1024;  // Q, K and V rows of one step: with scores and results, under 1 MB

struct Plan {
  const TemporalAttention& a;
  Shape shape;
  int64_t query_block, key_block;  // frames
  int64_t heads;                   // query heads of one step
  int64_t positions;               // of one item
  int64_t chunks, head_groups;
  bool split_heads;  // head groups are items of their own
  // Queries and keys of one block are read once, by the transpose and by the first product: where their rows can be
  // read as they lie, a copy would only be more traffic (a fifth of the time at T = 16). V is read once for every four
  // queries.
  bool q_in_place, k_in_place;
  bool stream;

  explicit Plan(const TemporalAttention& args) : a(args), shape(args) {
    const Shape& n = shape;
    query_block = smaller(round_up(n.T), kMaxQueryBlock);
    heads = n.H;
    // Fewer heads, at least one group, until the stage fits; then fewer keys.
    while (heads > n.group && heads * query_block * n.row + 2 * heads / n.group * n.K * n.row > kStageFloats)
      heads = n.fewer_heads(heads);
    const int64_t left = larger(kStageFloats - heads * query_block * n.row, W * 2 * n.row);
    key_block = smaller(n.K, left / (2 * heads / n.group * n.row));
    head_groups = n.H / heads;
    positions = larger(1, smaller(64, n.B * n.S / (8 * a.threads)));
    chunks = (n.S + positions - 1) / positions;
    split_heads = n.B * chunks < 4 * a.threads;
    k_in_place = query_block >= n.T && a.k.dtype == DType::f32 && !transformed(a);
    q_in_place = k_in_place && n.D % W == 0;  // the transpose reads whole vectors
    stream = streams(a.out);
  }

  int64_t items() const { return shape.B * chunks * (split_heads ? head_groups : 1); }
};

struct Tiles {
  Stage q, k, v, out;
  Tile q_transposed, scores;
  float *maximum, *sum, *factor;  // (heads, query_block), the same, (query_block,)
  Run *windows, *lows;
  StageNormRope norm_rope;

  Tiles(const Plan& p, Arena& arena) : norm_rope(p.a, p.shape.row, arena) {
    const int64_t row = p.shape.row, kv_heads = p.heads / p.shape.group;
    q = {arena.floats(p.heads * p.query_block * row), p.query_block, row};
    k = {arena.floats(kv_heads * p.key_block * row), p.key_block, row};
    v = {arena.floats(kv_heads * p.key_block * row), p.key_block, row};
    out = {arena.floats(p.heads * p.query_block * row), p.query_block, row};
    q_transposed = {arena.floats(row * p.query_block), p.query_block};
    scores = {arena.floats(p.key_block * p.query_block), p.query_block};
    maximum = arena.floats(p.heads * p.query_block);
    sum = arena.floats(p.heads * p.query_block);
    factor = arena.floats(p.query_block);
    windows = reinterpret_cast<Run*>(arena.floats(p.query_block * sizeof(Run) / 4));
    lows = reinterpret_cast<Run*>(arena.floats(p.query_block * sizeof(Run) / 4));
  }
};

// One head, one block of queries, one block of keys.
void attend(const Plan& p, const Tiles& t, const Place& place, const VisibleKeys& visible, int64_t head, Run queries,
            Run keys, bool first, Prefetch& prefetch) {
  const Shape& n = p.shape;
  const int64_t kv_head = head / n.group;
  const Tile q = p.q_in_place ? place.rows(p.a.q, queries.begin, place.heads.first + head) : t.q.head(head);
  const Tile k =
      p.k_in_place ? place.rows(p.a.k, keys.begin, place.kv_heads(n.group).first + kv_head) : t.k.head(kv_head);
  const Tile v = t.v.head(kv_head), out = t.out.head(head);
  transpose(queries.size(), n.D, q, p.a.scale * kLog2E, t.q_transposed);
  score_products(visible, queries.size(), keys.begin, keys.size(), n.D, k, t.q_transposed, t.scores, prefetch);
  add_bias(p.a, place.heads.first + head, keys, queries, t.scores);
  for (int64_t i = 0; i < queries.size(); i += W) {
    SoftmaxState state;
    float *maximum = t.maximum + head * p.query_block + i, *sum = t.sum + head * p.query_block + i;
    if (!first) state = {load(maximum), load(sum)};
    const ColumnMask mask(visible, i, queries.size(), keys.begin, keys.size());
    const vf factor = softmax_column(t.scores.at(0, i), mask, state);
    store(maximum, state.maximum);
    store(sum, state.sum);
    store(t.factor + i, factor);
  }
  if (!first)
    for (int64_t i = 0; i < queries.size(); ++i)
      for (int64_t c = 0; c < n.row; c += W) {
        float* at = out.at(i, c).data;
        store(at, load(at) * t.factor[i]);
      }
  const Scalars weights = {t.scores.data, 1, t.scores.row};
  if (visible.dense) return product(queries.size(), n.row, keys.size(), weights, v, out, !first, prefetch);
  product_over_runs(queries.size(), n.row, t.windows, weights, v, out, !first, prefetch);
  product_over_runs(queries.size(), n.row, t.lows, weights, v, out, true, prefetch);
}

template <DType T>
void write_rows(const Plan& p, const Tiles& t, const Place& place, Run queries) {
  const auto [b, s, heads] = place;
  const TensorView& out = p.a.out;
  const int64_t head_bytes = out.stride[3] * size_of(T);
  for (int64_t i = queries.begin; i < queries.end; ++i) {
    char* row = out.at(b, i, s, heads.first);
    for (int64_t h = 0; h < heads.count; ++h, row += head_bytes) {
      const float* in = t.out.head(h).at(i - queries.begin, 0).data;
      const float sum = t.sum[h * p.query_block + i - queries.begin];
      const float factor = sum == 0 ? 0 : 1 / sum;
      if (p.stream)
        stream_row<T>(row, p.shape.D, in, factor);
      else
        write_row<T>(row, p.shape.D, in, factor);
    }
  }
}

void write_lse(const Plan& p, const Tiles& t, const Place& place, Run queries) {
  const auto [b, s, heads] = place;
  for (int64_t h = 0; h < heads.count; ++h)
    for (int64_t i = 0; i < queries.size(); i += W) {
      const int64_t at = h * p.query_block + i;
      float lanes[W];
      store(lanes, log_sum_exp({load(t.maximum + at), load(t.sum + at)}));
      for (int64_t lane = 0; lane < smaller(W, queries.size() - i); ++lane)
        *reinterpret_cast<float*>(p.a.lse.at(b, queries.begin + i + lane, s, heads.first + h)) = lanes[lane];
    }
}

void gather_keys(const Plan& p, const Tiles& t, const SeenKeys& seen, const Place& place, int64_t first_key) {
  const Shape& n = p.shape;
  const HeadRange kv = place.kv_heads(n.group);
  const int64_t b = place.b, s = place.s;
  for (const Run& run : seen.runs) {
    if (!run.size()) continue;
    const Run frames = {first_key + run.begin, first_key + run.end};
    if (!p.k_in_place) {
      gather(p.a.k, b, s, frames, kv, n.D, t.k, run.begin);
      t.norm_rope.keys(p.a, b, s, frames, kv, t.k, run.begin);
    }
    gather(p.a.v, b, s, frames, kv, n.D, t.v, run.begin);
  }
}

void step(const Plan& p, const Tiles& t, const Place& place, Prefetch& prefetch) {
  const Shape& n = p.shape;
  const int64_t b = place.b, s = place.s, heads = place.heads.count;
  const bool one_key_block = p.key_block >= n.K;
  if (one_key_block) gather_keys(p, t, SeenKeys(visible_keys(p.a, b, 0), n.T, 0, n.K), place, 0);
  for (int64_t q = 0; q < n.T; q += p.query_block) {
    const Run queries = {q, smaller(n.T, q + p.query_block)};
    const VisibleKeys visible = visible_keys(p.a, b, q);
    if (!p.q_in_place) {
      gather(p.a.q, b, s, queries, place.heads, n.D, t.q, 0);
      t.norm_rope.queries(p.a, b, s, queries, place.heads, t.q);
    }
    bool first = true;
    for (int64_t k = 0; k < n.K; k += p.key_block) {
      const Run keys = {k, smaller(n.K, k + p.key_block)};
      const SeenKeys seen(visible, queries.size(), k, keys.size());
      if (!seen.any()) continue;
      if (!one_key_block) gather_keys(p, t, seen, place, k);
      if (!visible.dense) key_runs(visible, queries.size(), k, keys.size(), t.windows, t.lows);
      for (int64_t h = 0; h < heads; ++h) attend(p, t, place, visible, h, queries, keys, first, prefetch);
      first = false;
    }
    if (first) {  // these queries see nothing
      memset(t.out.data, 0, heads * p.query_block * n.row * sizeof(float));
      for (int64_t i = 0; i < heads * p.query_block; ++i) t.maximum[i] = -kInf, t.sum[i] = 0;
    }
    with_dtype(p.a.out.dtype, [&](auto type) { write_rows<decltype(type)::value>(p, t, place, queries); });
    if (p.a.lse) write_lse(p, t, place, queries);
  }
}

void run_item(const Plan& p, int64_t item) {
  const Shape& n = p.shape;
  Arena count(nullptr);
  Tiles(p, count);
  Arena arena(scratch(count.used()));
  const Tiles tiles(p, arena);

  int64_t first_group = 0, groups = p.head_groups;
  if (p.split_heads) {
    first_group = item % p.head_groups;
    groups = 1;
    item /= p.head_groups;
  }
  const int64_t b = item / p.chunks, s0 = item % p.chunks * p.positions;
  const int64_t steps = smaller(p.positions, n.S - s0) * groups;

  const TensorView* const tensors[] = {&p.a.q, &p.a.k, &p.a.v};
  const int64_t bytes = (n.T * n.H + 2 * n.K * n.G) * n.D * size_of(p.a.q.dtype);
  // Steps that the products of one position take: scores, then results.
  const int64_t blocks = (n.K + block_rows(2) - 1) / block_rows(2) * ((round_up(n.T) / W + 2) / 3) * n.D +
                         (n.T + block_rows(3) - 1) / block_rows(3) * ((n.row / W + 2) / 3) * n.K;
  for (int64_t i = 0; i < steps; ++i) {
    const auto position = [&](int64_t index) { return s0 + index / groups; };
    const auto head = [&](int64_t index) { return (first_group + index % groups) * p.heads; };
    NextRows next{tensors, 3, b, position(i + 1), head(i + 1), p.heads};
    Prefetch prefetch;
    if (i + 1 < steps && p.key_block >= n.K && p.query_block >= n.T) {
      prefetch.source = NextRows::next;
      prefetch.context = &next;
      prefetch.stride = smaller(64, larger(1, bytes / larger(1, blocks * n.H)));
    }
    step(p, tiles, {b, position(i), {head(i), p.heads}}, prefetch);
  }
  stream_fence();
}

}  // namespace

void temporal_attention_forward(const TemporalAttention& a) {
  Plan plan(a);
  parallel_for(
      plan.items(), a.threads, [](void* p, int64_t item) { run_item(*static_cast<const Plan*>(p), item); }, &plan);
}

}  // namespace vdcore::cpu::VDCORE_ISA
