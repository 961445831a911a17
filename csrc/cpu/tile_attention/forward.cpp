// Attention of a grid's tokens to windows and listed tiles, forward, in vectors: the online softmax of frame attention
// (frame_attention/forward.cpp), for units of one to three vectors of queries, over the runs of a tile that a unit sees.
//
// A pair costs 2 D multiply-adds and an exponential wherever somebody of its unit sees the key, and a comparison of two
// more instructions where not everybody does; a key is gathered once for a box of up to 192 queries. So what is lost
// against dense attention is what units see beyond their windows.
#include "cpu/tile_attention/boxes.h"

#include "common/threads.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class Forward {
 public:
  Forward(const TileAttention& args, Arena& arena)
      : a(args), plan(*args.plan), D(args.segment[0].q.size[4]), row(round_up(D)) {
    slots = reinterpret_cast<Slots*>(arena.floats((sizeof(Slots) + 3) / 4));
    view = reinterpret_cast<UnitView*>(arena.floats((sizeof(UnitView) + 3) / 4));
    tile = reinterpret_cast<OtherTile*>(arena.floats((sizeof(OtherTile) + 3) / 4));
    queries = arena.floats(kBoxTokens * row);
    out = {arena.floats(kBoxTokens * row), row};
    stage = {arena.floats(larger(kMostLanes, 2) * row), row};
    for (Tile* x : {&k, &v}) *x = {arena.floats(kOtherTile * row), row};
    scores = arena.floats(kOtherTile * kMostLanes);
    for (float** x : {&maximum, &sum}) *x = arena.floats(kBoxTokens);
    center = arena.floats(row);
  }

  void run(const Box& box, const Shape* shape) {
    const FrameSegment& segment = a.segment[box.text];
    const int64_t kv_head = box.head / (segment.q.size[3] / segment.k.size[3]);
    const int64_t list = plan.has_lists() ? list_of(box) : 0;
    find_slots(plan, box, shape, *slots);
    if (box.text) clear(box.sample, box.head, {true, smaller(larger(box.begin, plan.text_live[box.sample]), box.end), box.end});
    if (!slots->run_count) return;
    load_queries(segment.q, box);
    find_center(box, list, kv_head);
    for (int64_t i = 0; i < slots->units * slots->lanes; i += W) {
      store(maximum + i, splat(-kInf));
      store(sum + i, vf{});
    }
    memset(out.data, 0, slots->units * slots->lanes * row * sizeof(float));
    tile->count = tile->tokens = 0;
    const auto flush = [&] { attend(box, kv_head); };
    for_segments(plan, box, kQueries, list, false, [&](const Segment& s) { tile->add(s, flush); });
    tile->finish(flush);
    finish(segment, box);
  }

 private:
  const TileAttention& a;
  const TilePlan& plan;
  const int64_t D, row;
  Slots* slots;
  UnitView* view;
  OtherTile* tile;
  float* queries;  // per unit (row, lanes): transposed, times scale and log2(e)
  Tile out;        // (kBoxTokens, row): sums of exp2(score - maximum) * v
  Tile stage;      // (kMostLanes, row)
  Tile k, v;       // (kOtherTile, row)
  float* scores;   // (kOtherTile, lanes)
  float *maximum, *sum;
  float* center;  // (row,): what has been subtracted from every value, as in frame attention
  StrangeRows strange;

  int64_t list_of(const Box& box) const {
    return (plan.list_batch > 1 ? box.sample : 0) * plan.list_heads + (plan.list_heads > 1 ? box.head : 0);
  }

  void load_queries(const TensorView& q, const Box& box) const {
    int64_t u = 0;
    const auto finish_unit = [&] {
      transpose(slots->filled[u], D, stage, a.scale * kLog2E, {queries + u * slots->lanes * row, slots->lanes});
    };
    slots->for_runs([&](const SlotRun& r) {
      if (r.slot / slots->lanes != u) {
        finish_unit();
        u = r.slot / slots->lanes;
      }
      gather_run(q, box.sample, box.head, r.tokens, stage.at(r.slot % slots->lanes, 0));
    });
    finish_unit();
  }

  void find_center(const Box& box, int64_t list, int64_t kv_head) const {
    memset(center, 0, row * sizeof(float));
    if (a.segment[0].v.dtype != DType::f32) return;
    float* squares = stage.at(1, 0).data;
    mean_of_common(plan, box, kQueries, list, a.segment, &FrameSegment::v, kv_head, 16, stage, center, squares);
    for (int64_t c = 0; c < row; c += W) {
      const vf mean = load(center + c);
      store(center + c, select(2.f * mean * mean > load(squares + c), mean, vf{}));
    }
  }

  void attend(const Box& box, int64_t kv_head) {
    for (int64_t i = 0; i < tile->count; ++i) {
      const Piece& p = tile->pieces[i];
      const FrameSegment& from = a.segment[p.of.tokens.text];
      gather_run(from.k, box.sample, kv_head, p.of.tokens, k.at(p.at, 0));
      gather_run(from.v, box.sample, kv_head, p.of.tokens, v.at(p.at, 0));
    }
    strange.find(v, tile->tokens);
    if (a.segment[0].v.dtype == DType::f32)
      for (int64_t j = 0; j < tile->tokens; ++j)
        for (int64_t c = 0; c < row; c += W) {
          float* at = v.at(j, c).data;
          store(at, load(at) - load(center + c));
        }
    strange.take_out(v);
    for (int64_t u = 0; u < slots->units; ++u) {
      find_view(plan, box, kQueries, *slots, u, *tile, *view);
      if (view->run_count) attend_unit(box, kv_head, u);
    }
  }

  void attend_unit(const Box& box, int64_t kv_head, int64_t u) {
    NoPrefetch none;
    const int64_t lanes = slots->lanes, used = slots->in_use(u), first = u * lanes;
    const Tile s = {scores, lanes}, q = {queries + first * row, lanes}, to = out.at(first, 0);
    for (int64_t i = 0; i < view->run_count; ++i) {
      const Run& r = view->runs[i];
      score_product(r.size(), used, D, {k.at(r.begin, 0).data, row, 1}, q, s.at(r.begin, 0), none);
    }
    for (int64_t lane = 0; lane < used; lane += W) softmax(box, first, lane, smaller(W, slots->filled[u] - lane));
    for (int64_t i = 0; i < view->run_count; ++i) {
      const Run& r = view->runs[i];
      product(slots->filled[u], row, r.size(), {s.at(r.begin, 0).data, 1, lanes}, v.at(r.begin, 0), to, true, none);
    }
    if (strange.count)
      add_strange(plan, box, kQueries, *slots, u, *tile, *view, strange, a.segment[0].v, a.segment[1].v, kv_head, center,
                  s, to, stage);
  }

  // Scores of one vector of a unit become exp2(score - maximum), in place; hidden ones exactly 0.
  void softmax(const Box& box, int64_t first, int64_t lane, int64_t rows) {
    const int64_t lanes = slots->lanes;
    float* column = scores + lane;
    const vf before = load(maximum + first + lane);
    vf top = before;
    for (int64_t i = 0; i < view->part_count; ++i) {
      const UnitView::Edge& part = view->parts[i];
      if (!part.piece) {
        for (int64_t j = part.begin; j < part.end; ++j) top = max(top, load(column + j * lanes));
        continue;
      }
      const LaneMask mask(plan, box, kQueries, *slots, first + lane, *part.piece);
      for (int64_t j = part.begin; j < part.end; ++j) {
        const vf x = select(mask.sees(j), load(column + j * lanes), splat(-kInf));
        store(column + j * lanes, x);
        top = max(top, x);
      }
    }
    const vf base = select(top == -kInf, vf{}, top);  // all scores -inf: exp2(-inf - 0) is 0, not NaN
    const vf factor = exp2(before - base);
    vf total = {};
    for (int64_t i = 0; i < view->run_count; ++i)
      for (int64_t j = view->runs[i].begin; j < view->runs[i].end; ++j) {
        const vf p = exp2(load(column + j * lanes) - base);
        total += p;
        store(column + j * lanes, p);
      }
    store(maximum + first + lane, top);
    store(sum + first + lane, load(sum + first + lane) * factor + total);
    float factors[W];
    store(factors, factor);
    for (int64_t i = 0; i < rows; ++i) {
      if (factors[i] == 1.f) continue;
      float* at = out.at(first + lane + i, 0).data;
      for (int64_t c = 0; c < row; c += W) store(at + c, load(at + c) * factors[i]);
    }
  }

  void finish(const FrameSegment& segment, const Box& box) const {
    for (int64_t u = 0; u < slots->units; ++u)
      for (int64_t i = 0; i < slots->filled[u]; ++i) {
        const int64_t slot = u * slots->lanes + i;
        const float factor = sum[slot] == 0 ? 0 : 1 / sum[slot];
        float* at = out.at(slot, 0).data;
        for (int64_t c = 0; c < row; c += W)
          store(at + c, load(at + c) * factor + (factor == 0 ? vf{} : load(center + c)));
      }
    if (segment.lse)
      for (int64_t i = 0; i < slots->units * slots->lanes; i += W)
        store(sum + i, log_sum_exp({load(maximum + i), load(sum + i)}));
    slots->for_runs([&](const SlotRun& r) {
      scatter_run(segment.out, box.sample, box.head, r.tokens, out.at(r.slot, 0), 1);
      if (segment.lse)
        for_each_row(segment.lse, box.sample, box.head, r.tokens,
                     [&](char* at, int64_t i) { *reinterpret_cast<float*>(at) = sum[r.slot + i]; });
    });
  }

  void clear(int64_t sample, int64_t head, TokenRun tokens) const {
    const FrameSegment& segment = a.segment[tokens.text];
    clear_run(segment.out, sample, head, tokens);
    if (segment.lse)
      for_each_row(segment.lse, sample, head, tokens,
                   [&](char* at, int64_t) { *reinterpret_cast<float*>(at) = -kInf; });
  }
};

struct Job {
  const TileAttention& a;
  Boxes boxes;

  void run(int64_t i) const {
    const Box box = boxes.at(i);
    Arena count(nullptr);
    Forward(a, count);
    Arena arena(scratch(count.used()));
    Forward(a, arena).run(box, box.group ? &boxes.shape(box) : nullptr);
  }
};

}  // namespace

void tile_attention_forward(const TileAttention& a) {
  Shape* shapes = new Shape[larger(a.plan->group_count, 1)];
  Job job{a, {*a.plan, kQueries, a.segment[0].q.size[3], 1, shapes}};
  parallel_for(
      job.boxes.items(), a.threads, [](void* p, int64_t i) { static_cast<const Job*>(p)->run(i); }, &job);
  delete[] shapes;
}

}  // namespace vdcore::cpu::VDCORE_ISA
