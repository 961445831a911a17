// Attention of a grid's tokens to windows and listed tiles, backward, in vectors: with P recomputed from lse and delta
// = rowsum(dout * out) - dlse,
//   dV = P^T dO,   dS = P * (dO V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q.
//
// Two passes, seven products, in which every box has one owner: gradients of queries, then of keys and values, each
// with its own side in the lanes and the other one streaming by. So memory does not grow with tokens, and the bits do
// not depend on threads. The first pass knows what a row of dS adds up to, dlse but for rounding, and so how much delta
// errs (see frame_attention/backward.h): it takes that out of dQ, and leaves a better delta to the second.
#include "common/threads.h"
#include "cpu/tile_attention/boxes.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class Backward {
 public:
  Backward(const TileAttention& args, Arena& arena)
      : a(args),
        plan(*args.plan),
        H(args.segment[0].q.size[3]),
        shared(H / args.segment[0].k.size[3]),
        D(args.segment[0].q.size[4]),
        row(round_up(D)),
        video_rows(plan.frames[0] * plan.per_frame()),
        all_rows(video_rows + plan.text) {
    slots = reinterpret_cast<Slots*>(arena.floats((sizeof(Slots) + 3) / 4));
    view = reinterpret_cast<UnitView*>(arena.floats((sizeof(UnitView) + 3) / 4));
    tile = reinterpret_cast<OtherTile*>(arena.floats((sizeof(OtherTile) + 3) / 4));
    for (float** x : {&own[0], &own[1]}) *x = arena.floats(kBoxTokens * row);
    for (Tile* x : {&gradient[0], &gradient[1]}) *x = {arena.floats(kBoxTokens * row), row};
    for (Tile* x : {&stage, &stage_out}) *x = {arena.floats(kMostLanes * row), row};
    for (Tile* x : {&other[0], &other[1]}) *x = {arena.floats(kOtherTile * row), row};
    for (float** x : {&p, &ds}) *x = arena.floats(kOtherTile * kMostLanes);
    for (float** x : {&lse, &delta, &row_sum}) *x = arena.floats(larger(kBoxTokens, kOtherTile));
    mean = arena.floats(row);
  }

  // dq of a box of queries.
  void queries(const Box& box, const Shape* shape) {
    const FrameSegment& segment = a.segment[box.text];
    const int64_t list = list_of(box.sample, box.head), kv_head = box.head / shared;
    find_slots(plan, box, shape, *slots);
    if (box.text) clear_run(segment.dq, box.sample, box.head, dead_text(box));
    if (!slots->run_count) return;
    load_queries(segment, box);
    start(1);
    const auto flush = [&] { query_tile(box, kv_head); };
    for_segments(plan, box, kQueries, list, false, [&](const Segment& s) { tile->add(s, flush); });
    tile->finish(flush);
    mean_of_common(plan, box, kQueries, list, a.segment, &FrameSegment::k, kv_head, 32, stage, mean, nullptr);
    slots->for_runs([&](const SlotRun& r) {
      float* kept = delta_of(box.sample, box.head, r.tokens);
      if (segment.dlse)
        for_each_row(segment.dlse, box.sample, box.head, r.tokens,
                     [&](const char* at, int64_t i) { row_sum[r.slot + i] -= *reinterpret_cast<const float*>(at); });
      for (int64_t i = 0; i < r.tokens.size(); ++i) {
        const float error = row_sum[r.slot + i];
        kept[i] += error;
        float* at = gradient[0].at(r.slot + i, 0).data;
        for (int64_t c = 0; c < row; c += W) store(at + c, load(at + c) - error * load(mean + c));
      }
      scatter_run(segment.dq, box.sample, box.head, r.tokens, gradient[0].at(r.slot, 0), a.scale);
    });
  }

  // dk and dv of a box of keys, `head` their own.
  void keys(const Box& box, const Shape* shape) {
    const FrameSegment& segment = a.segment[box.text];
    find_slots(plan, box, shape, *slots);
    if (box.text)
      for (const TensorView* x : {&segment.dk, &segment.dv}) clear_run(*x, box.sample, box.head, dead_text(box));
    if (!slots->run_count) return;
    load_own(segment.k, box, a.scale * kLog2E, own[0]);
    load_own(segment.v, box, 1, own[1]);
    start(2);
    for (int64_t h = box.head * shared; h < (box.head + 1) * shared; ++h) {
      const auto flush = [&] { key_tile(box, h); };
      for_segments(plan, box, kKeys, list_of(box.sample, h), false, [&](const Segment& s) { tile->add(s, flush); });
      tile->finish(flush);
    }
    slots->for_runs([&](const SlotRun& r) {
      scatter_run(segment.dk, box.sample, box.head, r.tokens, gradient[0].at(r.slot, 0), a.scale);
      scatter_run(segment.dv, box.sample, box.head, r.tokens, gradient[1].at(r.slot, 0), 1);
    });
  }

 private:
  const TileAttention& a;
  const TilePlan& plan;
  const int64_t H, shared, D, row, video_rows, all_rows;  // shared: query heads of a key/value head
  Slots* slots;
  UnitView* view;
  OtherTile* tile;
  float* own[2];          // per unit (row, lanes): q and dout, or k and v, transposed
  Tile gradient[2];       // (kBoxTokens, row): dq, or dk and dv
  Tile stage, stage_out;  // (kMostLanes, row)
  Tile other[2];          // (kOtherTile, row): k and v, or q and dout
  float *p, *ds;          // (kOtherTile, lanes)
  float *lse, *delta;     // of queries, in slots or in the tile; lse in base 2
  float* row_sum;         // of dS, of the box's queries
  float* mean;            // (row,), of keys
  StrangeRows strange[2];

  int64_t list_of(int64_t sample, int64_t head) const {
    return (plan.list_batch > 1 ? sample : 0) * plan.list_heads + (plan.list_heads > 1 ? head : 0);
  }
  TokenRun dead_text(const Box& box) const {
    return {true, smaller(larger(box.begin, plan.text_live[box.sample]), box.end), box.end};
  }
  float* delta_of(int64_t b, int64_t head, const TokenRun& tokens) const {
    return a.delta + (b * H + head) * all_rows + (tokens.text ? video_rows : 0) + tokens.begin;
  }

  void start(int64_t gradients) {
    const int64_t all = slots->units * slots->lanes;
    for (int64_t i = 0; i < gradients; ++i) memset(gradient[i].data, 0, all * row * sizeof(float));
    memset(row_sum, 0, all * sizeof(float));
    tile->count = tile->tokens = 0;
  }

  void load_own(const TensorView& x, const Box& box, float factor, float* to) const {
    const auto gather = [&](int64_t slot, const TokenRun& tokens) {
      gather_run(x, box.sample, box.head, tokens, stage.at(slot, 0));
    };
    for_units(*slots, gather, [&](int64_t u) {
      transpose(slots->filled[u], D, stage, factor, {to + u * slots->lanes * row, slots->lanes});
    });
  }

  void load_queries(const FrameSegment& segment, const Box& box) const {
    load_own(segment.q, box, a.scale * kLog2E, own[0]);
    load_own(segment.dout, box, 1, own[1]);
    for (int64_t i = 0; i < slots->units * slots->lanes; ++i) lse[i] = kInf, delta[i] = 0;  // exp2(0 - inf) is 0
    slots->for_runs([&](const SlotRun& r) {
      const int64_t n = r.tokens.size();
      float* kept = delta_of(box.sample, box.head, r.tokens);
      gather_run(segment.out, box.sample, box.head, r.tokens, stage_out);
      gather_run(segment.dout, box.sample, box.head, r.tokens, stage);
      for (int64_t i = 0; i < n; ++i) {
        const float *out = stage_out.at(i, 0).data, *dout = stage.at(i, 0).data;
        double total = 0;
        for (int64_t c = 0; c < D; ++c) total += static_cast<double>(out[c]) * dout[c];
        kept[i] = static_cast<float>(total);
      }
      if (segment.dlse)
        for_each_row(segment.dlse, box.sample, box.head, r.tokens,
                     [&](const char* at, int64_t i) { kept[i] -= *reinterpret_cast<const float*>(at); });
      memcpy(delta + r.slot, kept, n * sizeof(float));
      load_lse(segment, box.sample, box.head, r.tokens, lse + r.slot);
    });
  }

  static void load_lse(const FrameSegment& segment, int64_t b, int64_t head, TokenRun tokens, float* to) {
    for_each_row(segment.lse, b, head, tokens, [&](const char* at, int64_t i) {
      const float x = *reinterpret_cast<const float*>(at) * kLog2E;
      to[i] = x == -kInf ? kInf : x;
    });
  }

  void gather_other(const TensorView FrameSegment::* first, const TensorView FrameSegment::* second, int64_t b,
                    int64_t head) const {
    for (int64_t i = 0; i < tile->count; ++i) {
      const Piece& piece = tile->pieces[i];
      const FrameSegment& from = a.segment[piece.of.tokens.text];
      gather_run(from.*first, b, head, piece.of.tokens, other[0].at(piece.at, 0));
      gather_run(from.*second, b, head, piece.of.tokens, other[1].at(piece.at, 0));
    }
  }

  // p = exponents in base 2 less nothing, ds = dP, of what a unit sees of the tile.
  void scores(int64_t u) const {
    NoPrefetch none;
    const int64_t lanes = slots->lanes, used = slots->in_use(u);
    for (int64_t i = 0; i < view->run_count; ++i) {
      const Run& r = view->runs[i];
      for (int64_t x = 0; x < 2; ++x)
        score_product(r.size(), used, D, {other[x].at(r.begin, 0).data, row, 1}, {own[x] + u * lanes * row, lanes},
                      {(x ? ds : p) + r.begin * lanes, lanes}, none);
    }
  }

  // P and dS in place; hidden ones exactly 0. shift(j), delta(j): lse and delta of what stands in lane and row.
  template <typename Lse, typename Delta>
  VDCORE_INLINE vf weigh(const Box& box, Side side, int64_t u, int64_t lane, const Lse& shift, const Delta& less) {
    const int64_t lanes = slots->lanes;
    vf total = {};
    for (int64_t i = 0; i < view->part_count; ++i) {
      const UnitView::Edge& part = view->parts[i];
      const auto one = [&](int64_t j, vi sees, bool edge) __attribute__((always_inline)) {
        float *weight = p + j * lanes + lane, *gradient_of = ds + j * lanes + lane;
        vf x = exp2(load(weight) - shift(j));
        vf dx = x * (load(gradient_of) - less(j));
        if (edge) x = select(sees, x, vf{}), dx = select(sees, dx, vf{});
        store(weight, x);
        store(gradient_of, dx);
        total += dx;
      };
      if (!part.piece) {
        for (int64_t j = part.begin; j < part.end; ++j) one(j, vi{}, false);
        continue;
      }
      const LaneMask mask(plan, box, side, *slots, u, lane, *part.piece);
      for (int64_t j = part.begin; j < part.end; ++j) one(j, mask.sees(j), true);
    }
    return total;
  }

  void add_product(const Box& box, Side side, int64_t u, float* weights, int64_t which, Tile to,
                   TensorView FrameSegment::* of, int64_t head) {
    NoPrefetch none;
    const int64_t lanes = slots->lanes;
    strange[which].take_out(other[which]);
    for (int64_t i = 0; i < view->run_count; ++i) {
      const Run& r = view->runs[i];
      product(slots->filled[u], row, r.size(), {weights + r.begin * lanes, 1, lanes}, other[which].at(r.begin, 0), to,
              true, none);
    }
    if (strange[which].count) {
      add_strange(
          plan, box, side, *slots, u, *tile, *view, strange[which], a.segment, of, head, stage,
          [&](int64_t j, int64_t lane, int64_t c, float x) { *to.at(lane, c).data += weights[j * lanes + lane] * x; });
      for (int64_t i = 0; i < strange[which].count; ++i) {  // back for the scores of the next unit
        const Piece* from;
        const int64_t j = strange[which].rows[i], offset = token_of(*tile, j, from);
        gather_run(a.segment[from->of.tokens.text].*of, box.sample, head, piece(from->of.tokens, offset, 1),
                   other[which].at(j, 0));
      }
    }
  }

  void query_tile(const Box& box, int64_t kv_head) {
    gather_other(&FrameSegment::k, &FrameSegment::v, box.sample, kv_head);
    strange[0].find(other[0], tile->tokens);
    for (int64_t u = 0; u < slots->units; ++u) {
      find_view(plan, box, kQueries, *slots, u, *tile, *view);
      if (!view->run_count) continue;
      scores(u);
      for (int64_t lane = 0; lane < slots->in_use(u); lane += W) {
        const int64_t slot = u * slots->lanes + lane;
        const vf shift = load(lse + slot), less = load(delta + slot);
        const vf total = weigh(
            box, kQueries, u, lane, [&](int64_t) __attribute__((always_inline)) { return shift; },
            [&](int64_t) __attribute__((always_inline)) { return less; });
        store(row_sum + slot, load(row_sum + slot) + total);
      }
      add_product(box, kQueries, u, ds, 0, gradient[0].at(u * slots->lanes, 0), &FrameSegment::k, kv_head);
    }
  }

  void key_tile(const Box& box, int64_t head) {
    gather_other(&FrameSegment::q, &FrameSegment::dout, box.sample, head);
    for (int64_t x = 0; x < 2; ++x) strange[x].find(other[x], tile->tokens);
    for (int64_t i = 0; i < tile->count; ++i) {
      const Piece& piece = tile->pieces[i];
      load_lse(a.segment[piece.of.tokens.text], box.sample, head, piece.of.tokens, lse + piece.at);
      memcpy(delta + piece.at, delta_of(box.sample, head, piece.of.tokens), piece.count * sizeof(float));
    }
    for (int64_t u = 0; u < slots->units; ++u) {
      find_view(plan, box, kKeys, *slots, u, *tile, *view);
      if (!view->run_count) continue;
      scores(u);
      for (int64_t lane = 0; lane < slots->in_use(u); lane += W)
        weigh(
            box, kKeys, u, lane, [&](int64_t j) __attribute__((always_inline)) { return splat(lse[j]); },
            [&](int64_t j) __attribute__((always_inline)) { return splat(delta[j]); });
      const int64_t first = u * slots->lanes;
      add_product(box, kKeys, u, ds, 0, gradient[0].at(first, 0), &FrameSegment::q, head);
      add_product(box, kKeys, u, p, 1, gradient[1].at(first, 0), &FrameSegment::dout, head);
    }
  }
};

struct Job {
  const TileAttention& a;
  Boxes boxes;
  void (Backward::*pass)(const Box&, const Shape*);

  void run(int64_t i) const {
    const Box box = boxes.at(i);
    Arena count(nullptr);
    Backward(a, count);
    Arena arena(scratch(count.used()));
    Backward backward(a, arena);
    (backward.*pass)(box, box.group ? &boxes.shape(box) : nullptr);
  }
};

}  // namespace

void tile_attention_backward(const TileAttention& a) {
  Shape* shapes = new Shape[larger(a.plan->group_count, 1)];
  const int64_t H = a.segment[0].q.size[3], G = a.segment[0].k.size[3];
  for (Side side : {kQueries, kKeys}) {
    Job job{a,
            {*a.plan, side, side == kQueries ? H : G, side == kQueries ? 1 : H / G, shapes},
            side == kQueries ? &Backward::queries : &Backward::keys};
    parallel_for(job.boxes.items(), a.threads, [](void* p, int64_t i) { static_cast<const Job*>(p)->run(i); }, &job);
  }
  delete[] shapes;
}

}  // namespace vdcore::cpu::VDCORE_ISA
