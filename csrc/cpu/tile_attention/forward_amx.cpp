// Attention of a grid's tokens to windows and listed tiles, forward, of bfloat16 in pairs; other dtypes as without
// them.
//
// Scores are K Q^T and results V^T P, as in frame_attention/forward_amx.cpp. Products take rows and terms in steps of
// kLeastTerms: the runs that a unit sees grow to whole steps, and what they did not hold weighs 0.
#include "cpu/frame_attention/amx_rows.h"
#include "cpu/tile_attention/forward.h"

namespace vdcore::cpu::VDCORE_REST {
void tile_attention_forward(const TileAttention&);
}

namespace vdcore::cpu::VDCORE_ISA {
namespace {

// C[0:m, 0:n] += A[0:m, steps] B[steps, 0:n]: the sums stay in registers from step to step, of which a unit may have
// four or five in a tile, a dozen pairs of terms each. m a multiple of 16, n of one to three vectors.
#if defined(VDCORE_DOT_PRODUCTS)

template <int M, int N>
__attribute__((noinline)) void product_over_steps(int64_t m, const Run* steps, int64_t count, Rows a, Pairs b, Tile c) {
  for (int64_t r = 0; r < m; r += M) {
    __m512 sum[M][N];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[i][n] = load(c.at(r + i, n * W).data);
    for (int64_t step = 0; step < count; ++step) {
      const uint16_t* left = a.at(r, steps[step].begin).data;
      const uint16_t* right = b.at(steps[step].begin, 0).data;
      for (int64_t k = steps[step].begin; k < steps[step].end; k += 2, left += 2, right += b.row) {
        __m512bh row[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) memcpy(&row[n], right + 2 * n * W, sizeof row[n]);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          int32_t pair;
          memcpy(&pair, left + i * a.row, sizeof pair);
          const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) sum[i][n] = _mm512_dpbf16_ps(sum[i][n], x, row[n]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store(c.at(r + i, n * W).data, sum[i][n]);
  }
}

VDCORE_INLINE void add_over_steps(int64_t m, int64_t n, const Run* steps, int64_t count, Rows a, Pairs b, Tile c) {
  if (n == W)
    product_over_steps<16, 1>(m, steps, count, a, b, c);
  else if (n == 2 * W)
    product_over_steps<8, 2>(m, steps, count, a, b, c);
  else
    product_over_steps<8, 3>(m, steps, count, a, b, c);
}

#else

VDCORE_INLINE void add_over_steps(int64_t m, int64_t n, const Run* steps, int64_t count, Rows a, Pairs b, Tile c) {
  for (int64_t i = 0; i < count; ++i)
    product(m, n, steps[i].size(), a.at(0, steps[i].begin), b.at(steps[i].begin, 0), c, true);
}

#endif

class MatrixProducts {
 public:
  static constexpr bool kCenters = false;

  MatrixProducts(ForwardState& state, Arena& arena) : s(state), terms(whole_terms(state.D)) {
    queries = halves(arena, kBoxTokens * terms);
    lanes_of = {halves(arena, kMostLanes * terms), terms};
    for (Rows* x : {&k, &stage}) *x = {halves(arena, kOtherTile * terms), terms};
    v = {halves(arena, s.row * kOtherTile), kOtherTile};
    scores = arena.floats(kOtherTile * kMostLanes);
    weights = halves(arena, kOtherTile * kMostLanes);
    results = arena.floats(kBoxTokens * s.row);
  }

  void load_queries() const {
    const int64_t lanes = s.slots->lanes;
    const TensorView& q = s.a.segment[s.box.text].q;
    for_units(
        *s.slots,
        [&](int64_t slot, const TokenRun& tokens) {
          gather_rows(q, s.box.sample, s.box.head, tokens, tokens.size(), lanes_of.at(slot, 0));
        },
        [&](int64_t u) {
          memset(lanes_of.at(s.slots->filled[u], 0).data, 0, (lanes - s.slots->filled[u]) * terms * sizeof(uint16_t));
          pack_transposed(lanes, terms, lanes_of, unit(u),
                          s.a.scale < 0 ? 0x80008000u : 0u);  // so that the factor is positive
        });
    memset(results, 0, s.all_slots() * s.row * sizeof(float));
  }

  void gather() {
    const int64_t steps = whole_terms(s.tile->tokens);
    for (int64_t i = 0; i < s.tile->count; ++i) {
      const Piece& p = s.tile->pieces[i];
      const FrameSegment& from = s.a.segment[p.of.tokens.text];
      gather_rows(from.k, s.box.sample, s.kv_head, p.of.tokens, p.count, k.at(p.at, 0));
      gather_rows(from.v, s.box.sample, s.kv_head, p.of.tokens, p.count, stage.at(p.at, 0));
    }
    for (const Rows& x : {k, stage})
      memset(x.at(s.tile->tokens, 0).data, 0, (steps - s.tile->tokens) * terms * sizeof(uint16_t));
    find_strange();
    transpose_rows(steps, s.row, stage, v);
  }

  void attend(int64_t u) {
    const int64_t lanes = s.slots->lanes, used = s.slots->in_use(u);
    find_steps();
    for (int64_t i = 0; i < step_count; ++i)
      product(steps[i].size(), used, terms, k.at(steps[i].begin, 0), unit(u), {scores + steps[i].begin * lanes, lanes},
              false);
    const Pairs p = {weights, 2 * lanes};
    for (int64_t lane = 0; lane < used; lane += W) softmax(u, lane, p);
    add_over_steps(s.row, used, steps, step_count, v, p, result(u));
    if (strange.count)
      add_strange(s.plan, s.box, kQueries, *s.slots, u, *s.tile, *s.view, strange, s.a.segment, &FrameSegment::v,
                  s.kv_head, s.stage, [&](int64_t j, int64_t lane, int64_t c, float x) {
                    const uint32_t bits = uint32_t{p.at(j, lane).data[j % 2]} << 16;
                    float weight;
                    memcpy(&weight, &bits, sizeof weight);
                    *result(u).at(c, lane).data += weight * x;
                  });
  }

  // Units' results, transposed into rows.
  void finish() const {
    for (int64_t u = 0; u < s.slots->units; ++u)
      transpose(s.row, s.slots->in_use(u), result(u), 1.f, s.out.at(u * s.slots->lanes, 0));
  }

 private:
  ForwardState& s;
  const int64_t terms;
  TileScope registers;
  uint16_t* queries;  // per unit pairs (terms, lanes)
  Rows lanes_of;      // (kMostLanes, terms)
  Rows k, stage;      // (kOtherTile, terms)
  Rows v;             // (row, kOtherTile)
  float* scores;      // (kOtherTile, lanes)
  uint16_t* weights;  // pairs (kOtherTile, lanes)
  float* results;     // per unit (row, lanes)
  StrangeRows strange;
  Run steps[kOtherTile];  // of the unit's runs
  int64_t step_count = 0;

  Pairs unit(int64_t u) const { return {queries + u * s.slots->lanes * terms, 2 * s.slots->lanes}; }
  Tile result(int64_t u) const { return {results + u * s.slots->lanes * s.row, s.slots->lanes}; }

  void find_strange() {
    strange.count = 0;
    for (int64_t j = 0; j < s.tile->tokens; ++j) {
      uint16_t* at = stage.at(j, 0).data;
      vi most = {};
      for (int64_t c = 0; c < terms; c += W) most |= (load_bf16(at + c) & 0x7F80u) == 0x7F80u;
      float lanes[W];
      store(lanes, reinterpret_cast<vf>(most & 0x3F800000u));
      float total = 0;
      for (float x : lanes) total += x;
      if (total == 0) continue;
      strange.rows[strange.count++] = static_cast<int32_t>(j);
      memset(at, 0, terms * sizeof(uint16_t));
    }
  }

  void find_steps() {
    step_count = 0;
    for (int64_t i = 0; i < s.view->run_count; ++i) {
      const int64_t begin = s.view->runs[i].begin / kLeastTerms * kLeastTerms;
      const int64_t end = (s.view->runs[i].end + kLeastTerms - 1) / kLeastTerms * kLeastTerms;
      if (step_count && begin <= steps[step_count - 1].end)
        steps[step_count - 1].end = end;
      else
        steps[step_count++] = {begin, end};
    }
  }

  // Scores of one vector of a unit become weights, in pairs of keys; hidden ones exactly 0.
  void softmax(int64_t u, int64_t lane, Pairs to) const {
    const int64_t lanes = s.slots->lanes, slot = u * lanes + lane;
    const float factor = __builtin_fabsf(s.a.scale) * kLog2E;
    float* column = scores + lane;
    const auto hide = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) store(column + j * lanes, splat(-kInf));
    };
    vf top = splat(-kInf);
    int64_t at = steps[0].begin, step = 0;
    for (int64_t i = 0; i < s.view->part_count; ++i) {
      const UnitView::Edge& part = s.view->parts[i];
      for (; part.begin >= steps[step].end; at = steps[++step].begin) hide(at, steps[step].end);
      hide(at, part.begin);
      at = part.end;
      if (!part.piece) {
        for (int64_t j = part.begin; j < part.end; ++j) top = max(top, load(column + j * lanes));
        continue;
      }
      const LaneMask mask(s.plan, s.box, kQueries, *s.slots, u, lane, *part.piece);
      for (int64_t j = part.begin; j < part.end; ++j) {
        const vf x = select(mask.sees(j), load(column + j * lanes), splat(-kInf));
        store(column + j * lanes, x);
        top = max(top, x);
      }
    }
    hide(at, steps[step].end);
    const vf before = load(s.maximum + slot), now = max(before, top * factor);
    const vf base = select(now == -kInf, vf{}, now), rescale = exp2(before - base);
    vf even = {}, odd = {};
    for (int64_t i = 0; i < step_count; ++i)
      for (int64_t j = steps[i].begin; j < steps[i].end; j += 2) {
        const vf first = exp2(load(column + j * lanes) * factor - base);
        const vf second = exp2(load(column + (j + 1) * lanes) * factor - base);
        even += first;
        odd += second;
        store_words(to.at(j, lane).data, pair(first, second));
      }
    store(s.maximum + slot, now);
    store(s.sum + slot, load(s.sum + slot) * rescale + (even + odd));
    float factors[W], lowest = 1;
    store(factors, rescale);
    for (float x : factors) lowest = x < lowest ? x : lowest;
    if (lowest == 1) return;
    float* result_at = result(u).at(0, lane).data;
    for (int64_t c = 0; c < s.row; ++c, result_at += lanes) store(result_at, load(result_at) * rescale);
  }
};

bool in_bf16(const TileAttention& a) {
  for (const FrameSegment& segment : a.segment)
    for (const TensorView* x : {&segment.q, &segment.k, &segment.v})
      if (*x && x->dtype != DType::bf16) return false;
  return true;
}

}  // namespace

// A factor of 0 would make NaN of what is hidden.
void tile_attention_forward(const TileAttention& a) {
  if (!in_bf16(a) || a.scale == 0) return VDCORE_REST::tile_attention_forward(a);
  ForwardJob<MatrixProducts>::run_all(a);
}

}  // namespace vdcore::cpu::VDCORE_ISA
