// Temporal attention, forward, of bfloat16 in pairs: in AMX's tiles, or in dot products. Other dtypes, a bias and more
// frames than a step holds go as without them.
//
// Rows are staged as they are, half the bytes of float32. Scores are K Q^T, so that the softmax runs down the lanes;
// weights become pairs of keys, are transposed into rows of queries, and results are P V, with values interleaved in
// pairs: nothing of D channels is transposed but Q.
#include "cpu/core/pairs.h"
#include "cpu/qk_norm_rope/stage_norm_rope.h"
#include "cpu/temporal_attention/forward.h"

namespace vdcore::cpu::VDCORE_FLOATS {
void temporal_attention_forward(const TemporalAttention&);
}

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kStageHalves = 224 * 1024;  // bytes as in forward.cpp

// Rows of scores, and terms of results, in which keys are computed.
constexpr int64_t kLeastRows = kLeastTerms < kTileRows ? kLeastTerms : kTileRows;
VDCORE_INLINE int64_t whole_keys(int64_t n) { return (n + kLeastRows - 1) / kLeastRows * kLeastRows; }
VDCORE_INLINE int64_t whole_steps(int64_t n) { return (n + kLeastTerms - 1) / kLeastTerms * kLeastTerms; }

class MatrixStep {
 public:
  MatrixStep(const TemporalPlan& plan, Arena& arena)
      : p(plan),
        n(plan.shape),
        terms(whole_terms(n.D)),
        key_rows(whole_terms(n.K)),
        t(plan, arena),
        norm_rope(plan.a, n.row, arena) {
    const int64_t kv_heads = p.heads / n.group;
    q = staged(arena, p.heads * p.query_block);
    k = staged(arena, kv_heads * key_rows);
    v = staged(arena, kv_heads * key_rows);
    if (transformed(p.a)) {
      const int64_t rows = larger(p.heads * p.query_block, kv_heads * n.K);
      floats = arena.floats(rows * n.row);
    }
    queries = {halves(arena, terms * p.query_block), 2 * p.query_block};
    scores = {arena.floats(key_rows * p.query_block), p.query_block};
    words = {halves(arena, key_rows * p.query_block), 2 * p.query_block};
    weights = {halves(arena, p.query_block * key_rows), key_rows};
    values = {halves(arena, key_rows * n.row), 2 * n.row};
    strange = reinterpret_cast<int32_t*>(arena.floats(kv_heads * n.K));
    strange_count = reinterpret_cast<int32_t*>(arena.floats(kv_heads));
  }

  int64_t bytes_at_once() const { return 64; }

  void run(const Place& place, Prefetch& prefetch) {
    const HeadRange kv = place.kv_heads(n.group);
    const SeenKeys seen(visible_keys(p.a, place.b, 0), n.T, 0, n.K);
    for (const Run& run : seen.runs) {
      if (!run.size()) continue;
      load_rows(p.a.k, place, run, kv, k, key_rows, run.begin, kKeys);
      load_rows(p.a.v, place, run, kv, v, key_rows, run.begin, kAsTheyAre);
    }
    // Of a head of the next step, a third each time.
    const int64_t lines = (n.T * n.group + 2 * n.K) * n.D * size_of(DType::bf16) / (64 * 3 * n.group) + 1;
    for (int64_t i = 0; i < n.T; i += p.query_block) {
      const Run block = {i, smaller(n.T, i + p.query_block)};
      const VisibleKeys visible = visible_keys(p.a, place.b, i);
      load_rows(p.a.q, place, block, place.heads, q, p.query_block, 0, kQueries);
      for (int64_t h = 0; h < place.heads.count; ++h) {
        if (h % n.group == 0) {
          if (i == 0) take_out_strange(visible, seen, h / n.group);
          pack_pairs(whole_steps(n.K), n.row, v.at(h / n.group * key_rows, 0), values);
        }
        attend(visible, h, block.size(), lines, prefetch);
        add_strange(visible, place, h, block.size());
      }
      write_results(p, t, place, block);
    }
  }

 private:
  enum Transform { kQueries, kKeys, kAsTheyAre };

  const TemporalPlan& p;
  const Shape& n;
  const int64_t terms, key_rows;
  TileScope registers;
  TemporalResults t;
  StageNormRope norm_rope;
  Rows q, k, v;             // (heads, query_block, terms), (kv heads, key_rows, terms) twice; padding is 0
  float* floats = nullptr;  // rows before they are rounded, where there are norms or angles
  Pairs queries;            // (terms, query_block)
  Tile scores;              // (key_rows, query_block)
  Pairs words;              // the same, weights
  Rows weights;             // (query_block, key_rows)
  Pairs values;             // (key_rows, row)
  int32_t* strange;         // (kv heads, K), keys with infinity or NaN in their values
  int32_t* strange_count;   // (kv heads,)

  Rows staged(Arena& arena, int64_t rows) const {
    uint16_t* const data = halves(arena, rows * terms);
    if (data) memset(data, 0, rows * terms * sizeof(uint16_t));
    return {data, terms};
  }

  // Rows [offset, offset + frames.size()) of every head of `to` = rows of x in `frames`.
  void load_rows(const TensorView& x, const Place& place, Run frames, HeadRange heads, Rows to, int64_t rows,
                 int64_t offset, Transform transform) const {
    if (transform != kAsTheyAre && floats) {
      const Stage stage = {floats, frames.size(), n.row};
      gather(x, place.b, place.s, frames, heads, n.D, stage, 0);
      if (transform == kQueries)
        norm_rope.queries(p.a, place.b, place.s, frames, heads, stage);
      else
        norm_rope.keys(p.a, place.b, place.s, frames, heads, stage, 0);
      for (int64_t h = 0; h < heads.count; ++h)
        for (int64_t i = 0; i < frames.size(); ++i)
          write_row<DType::bf16>(reinterpret_cast<char*>(to.at(h * rows + offset + i, 0).data), n.D,
                                 stage.head(h).at(i, 0).data, 1.f);
      return;
    }
    const int64_t head_bytes = x.stride[3] * size_of(DType::bf16);
    for (int64_t i = 0; i < frames.size(); ++i) {
      const char* in = x.at(place.b, frames.begin + i, place.s, heads.first);
      for (int64_t h = 0; h < heads.count; ++h, in += head_bytes)
        copy_row<DType::bf16>(in, n.D, to.at(h * rows + offset + i, 0).data);
    }
  }

  // A head's rows of values with infinity or NaN, where somebody may not see them, become 0: 0 times them would reach
  // everybody. So no row that a step before this one has left holds any. All blocks of queries need to know of them.
  void take_out_strange(const VisibleKeys& visible, const SeenKeys& seen, int64_t kv_head) const {
    const Rows rows = v.at(kv_head * key_rows, 0);
    int32_t count = 0;
    for (const Run& run : seen.runs)
      for (int64_t j = run.begin; j < run.end && !visible.dense; ++j) {
        if (!any_lane(strange_lanes(rows.at(j, 0).data, n.row))) continue;
        strange[kv_head * n.K + count++] = static_cast<int32_t>(j);
        memset(rows.at(j, 0).data, 0, terms * sizeof(uint16_t));
      }
    strange_count[kv_head] = count;
  }

  void attend(const VisibleKeys& visible, int64_t head, int64_t count, int64_t lines, Prefetch& prefetch) const {
    const int64_t whole = whole_rows(count);
    const Rows keys = k.at(head / n.group * key_rows, 0);
    const Tile out = t.out.head(head);
    pack_transposed(whole, terms, q.at(head * p.query_block, 0), queries,
                    p.a.scale < 0 ? 0x80008000u : 0u);  // so that the factor is positive
    fetch(lines, prefetch);
    if (visible.dense) product(whole_keys(n.K), whole, terms, keys, queries, scores, false);
    for (int64_t i = 0; i < whole; i += W) {
      const ColumnMask mask(visible, i, count, 0, n.K);
      Run runs[2];
      const int64_t some = steps_of(mask, runs);
      if (!visible.dense)
        for (int64_t r = 0; r < some; ++r)
          product(runs[r].size(), W, terms, keys.at(runs[r].begin, 0), queries.at(0, i), scores.at(runs[r].begin, i),
                  false);
      if (i == 0) fetch(lines, prefetch);
      softmax(mask, runs, some, head, i);
      if (visible.dense) continue;
      for (int64_t r = 0; r < some; ++r)
        product(W, n.row, runs[r].size(), weights.at(i, runs[r].begin), values.at(runs[r].begin, 0), out.at(i, 0),
                r > 0);
      if (!some) memset(out.at(i, 0).data, 0, W * n.row * sizeof(float));
    }
    fetch(lines, prefetch);
    if (visible.dense) product(whole, n.row, whole_steps(n.K), weights, values, out, false);
  }

  // What a column of queries sees, in whole steps: one run or two.
  static int64_t steps_of(const ColumnMask& mask, Run (&runs)[2]) {
    int64_t count = 0;
    for (const Run& run : mask.segments) {
      if (!run.size()) continue;
      const Run whole = {run.begin / kLeastTerms * kLeastTerms, whole_steps(run.end)};
      if (count && whole.begin <= runs[count - 1].end)
        runs[count - 1].end = whole.end;
      else
        runs[count++] = whole;
    }
    return count;
  }

  // Scores of W queries become weights, as rows of them; hidden ones, and what fills up a step, exactly 0.
  void softmax(const ColumnMask& mask, const Run* runs, int64_t count, int64_t head, int64_t i) const {
    const float factor = __builtin_fabsf(p.a.scale) * kLog2E;
    float* const column = scores.at(0, i).data;
    const int64_t row = scores.row;
    vf top = splat(-kInf);
    int64_t r = 0, at = count ? runs[0].begin : 0;
    const auto hide = [&](int64_t end) {
      for (; at < end; ++at) store(column + at * row, splat(-kInf));
    };
    mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
      while (j >= runs[r].end) {
        hide(runs[r].end);
        at = runs[++r].begin;
      }
      hide(j);
      at = j + 1;
      vf x = load(column + j * row);
      if (masked) {
        x = select(mask.sees(j), x, splat(-kInf));
        store(column + j * row, x);
      }
      top = max(top, x);
    });
    if (count) hide(runs[r].end);
    // Subtracted before they are multiplied: a fused multiply and add of scores beyond 2^30 would leave the largest one
    // off 0 by what rounding took from it, more than exp2 bears.
    const vf base = select(top == -kInf, vf{}, top);
    vf even = {}, odd = {};
    for (r = 0; r < count; ++r) {
      for (int64_t j = runs[r].begin; j < runs[r].end; j += 2) {
        const vf first = exp2((load(column + j * row) - base) * factor);
        const vf second = exp2((load(column + (j + 1) * row) - base) * factor);
        even += first;
        odd += second;
        store_words(words.at(j, i).data, pair(first, second));
      }
      for (int64_t j = runs[r].begin / kTileTerms * kTileTerms; j < runs[r].end; j += kTileTerms)
        transpose_words(words.at(j, i).data, words.row, weights.at(i, j).data, weights.row);
    }
    store(t.maximum + head * p.query_block + i, top * factor);
    store(t.sum + head * p.query_block + i, even + odd);
  }

  // What was taken out, for those that see it.
  void add_strange(const VisibleKeys& visible, const Place& place, int64_t head, int64_t count) const {
    const int64_t kv_head = head / n.group;
    for (int64_t s = 0; s < strange_count[kv_head]; ++s) {
      const int64_t j = strange[kv_head * n.K + s];
      const auto* from =
          reinterpret_cast<const uint16_t*>(p.a.v.at(place.b, j, place.s, place.kv_heads(n.group).first + kv_head));
      for (int64_t i = 0; i < count; ++i) {
        const bool sees =
            (visible.begin[i] <= j && j < visible.end[i]) || (visible.low_begin[i] <= j && j < visible.low_end[i]);
        if (!sees) continue;
        const float weight = from_bf16(*weights.at(i, j).data);
        for (int64_t c = 0; c < n.D; ++c) *t.out.head(head).at(i, c).data += weight * from_bf16(from[c]);
      }
    }
  }

  static void fetch(int64_t lines, Prefetch& prefetch) {
    if (prefetch.source)
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(prefetch.take(1));
  }
};

// A few queries of many keys fill a quarter of a tile, for which all keys and values are packed: 4 of 32 frames took
// 1.05 of the time of float32, 8 of 32 0.97, and 8, 16, 32 and 64 of as many 0.90, 0.81, 0.80 and 0.79 (one thread,
// AVX512-BF16, 40, 72, 64 and 64 channels). A factor of 0 would make NaN of what is hidden.
bool in_pairs(const TemporalAttention& a) {
  const bool in_bf16 = a.q.dtype == DType::bf16 && a.k.dtype == DType::bf16 && a.v.dtype == DType::bf16;
  const bool few = a.q.size[1] < W / 2 && a.k.size[1] > W;
  return in_bf16 && !few && !a.bias && a.scale != 0;
}

}  // namespace

void temporal_attention_forward(const TemporalAttention& a) {
  if (in_pairs(a)) {
    const TemporalPlan plan(a, kStageHalves);
    if (plan.one_key_block()) return run_temporal<MatrixStep>(plan);
  }
  VDCORE_FLOATS::temporal_attention_forward(a);
}

}  // namespace vdcore::cpu::VDCORE_ISA
