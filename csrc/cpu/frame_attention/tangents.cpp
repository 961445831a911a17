// Tangents of frame attention. With P the probabilities and E = scale (dq k^T + q dk^T) the scores' tangent,
// dlse = sum(P E) along a row and dout = (P E) v + P dv - dlse out. P comes from forward's lse, so that one pass over
// the keys is enough and nothing is rescaled: three products a tile with the tangent of q alone, five with all three.
//
// E may have a mean much larger than its deviations, which cancels in dout only up to rounding, and out was rounded: so
// every row's E is taken less its mean over the first tile of keys, which dlse gets back at the end.
#include "cpu/frame_attention/tangents.h"

#include "common/threads.h"
#include "cpu/frame_attention/tiles.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kPanel = 3 * W;  // queries whose scores stay in L1, as in forward
constexpr int64_t kQueryTile = 192 / kPanel * kPanel;
constexpr int64_t kKeyTile = 80;  // scores and their tangents, 30 KB, and a usual prompt in one

struct Tiles {
  Tile q, dq;         // per panel (row, kPanel): transposed, times scale and log2(e)
  Tile stage;         // (kPanel, row)
  Tile k, dk, v, dv;  // (kKeyTile, row)
  Tile p, e;          // (kKeyTile, kPanel)
  Tile out;           // (kQueryTile, row)
  float *lse, *shift, *sum;

  Tiles(int64_t row, Arena& arena) {
    const auto tile = [&](int64_t rows, int64_t columns) { return Tile{arena.floats(rows * columns), columns}; };
    q = tile(kQueryTile / kPanel * row, kPanel), dq = tile(kQueryTile / kPanel * row, kPanel);
    stage = tile(kPanel, row), out = tile(kQueryTile, row);
    k = tile(kKeyTile, row), dk = tile(kKeyTile, row), v = tile(kKeyTile, row), dv = tile(kKeyTile, row);
    p = tile(kKeyTile, kPanel), e = tile(kKeyTile, kPanel);
    lse = arena.floats(kQueryTile), shift = arena.floats(kQueryTile), sum = arena.floats(kQueryTile);
  }
};

class Tangents {
 public:
  Tangents(const FrameTangents& args, const Tiles& tiles, const TokenGroup& group, int64_t head, TokenRun queries)
      : a(args),
        t(tiles),
        group(group),
        segment(args.of(queries)),
        queries(queries),
        head(head),
        kv_head(head / (segment.q.size[3] / segment.k.size[3])),
        D(segment.q.size[4]),
        row(round_up(D)),
        moves(segment.dq || segment.dk) {}

  void run() {
    load_queries();
    bool first = true;
    for (int i = 0; i < group.count; ++i) {
      const int64_t keys = group.runs[i].size(), tiles = (keys + kKeyTile - 1) / kKeyTile;
      const int64_t even = tiles ? (keys + tiles - 1) / tiles : 0;  // 256 keys are four 64s, not three 80s and a 16
      for (int64_t j = 0; j < keys; j += even) {
        attend(piece(group.runs[i], j, even), first);
        first = false;
      }
    }
    if (first || !(moves || segment.dv)) memset(t.out.data, 0, queries.size() * row * sizeof(float));
    finish();
  }

 private:
  const FrameTangents& a;
  const Tiles& t;
  const TokenGroup& group;
  const TangentSegment& segment;
  const TokenRun queries;
  const int64_t head, kv_head, D, row;
  const bool moves;  // the scores have a tangent

  void load_queries() {
    for (int64_t i = 0; i < queries.size(); i += kPanel) {
      load_panel(segment.q, i, t.q);
      if (segment.dq) load_panel(segment.dq, i, t.dq);
    }
    for_each_row(segment.lse, group.sample, head, queries, [&](const char* at, int64_t i) {
      const float lse = *reinterpret_cast<const float*>(at);
      t.lse[i] = lse == -kInf ? 0 : lse * kLog2E;  // all scores -inf: exp2(-inf - 0) is 0, not NaN
    });
    for (int64_t i = queries.size(); i < kQueryTile; ++i) t.lse[i] = 0;
    for (int64_t i = 0; i < kQueryTile; i += W) {
      store(t.shift + i, vf{});
      store(t.sum + i, vf{});
    }
  }
  void load_panel(const TensorView& x, int64_t i, const Tile& to) {
    const TokenRun rows = piece(queries, i, kPanel);
    gather_run(x, group.sample, head, rows, t.stage);
    transpose(rows.size(), D, t.stage, a.scale * kLog2E, {to.data + i * row, kPanel});
  }

  void attend(TokenRun keys, bool first) {
    const TangentSegment& from = a.of(keys);
    gather_run(from.k, group.sample, kv_head, keys, t.k);
    gather_run(from.v, group.sample, kv_head, keys, t.v);
    if (from.dk) gather_run(from.dk, group.sample, kv_head, keys, t.dk);
    if (from.dv) gather_run(from.dv, group.sample, kv_head, keys, t.dv);
    NoPrefetch none;
    for (int64_t i = 0; i < queries.size(); i += kPanel) {
      const int64_t rows = smaller(kPanel, queries.size() - i), lanes = round_up(rows), n = keys.size();
      const Tile q = {t.q.data + i * row, kPanel}, dq = {t.dq.data + i * row, kPanel};
      score_product(n, lanes, D, {t.k.data, row, 1}, q, t.p, none);
      if (from.dq) score_product(n, lanes, D, {t.k.data, row, 1}, dq, t.e, none);
      if (from.dk) product(n, lanes, D, {t.dk.data, row, 1}, q, t.e, static_cast<bool>(from.dq), none);
      for (int64_t lane = 0; lane < lanes; lane += W) weigh(lane, n, i + lane, first);
      if (moves) product(rows, row, n, {t.e.data, 1, kPanel}, t.v, t.out.at(i, 0), !first, none);
      if (from.dv) product(rows, row, n, {t.p.data, 1, kPanel}, t.dv, t.out.at(i, 0), !first || moves, none);
    }
  }

  // A vector of queries: scores become P, their tangents P (E - shift).
  VDCORE_INLINE void weigh(int64_t lane, int64_t keys, int64_t query, bool first) {
    float *p = t.p.data + lane, *e = t.e.data + lane;
    const vf lse = load(t.lse + query);
    if (!moves) {
      for (int64_t j = 0; j < keys; ++j, p += kPanel) store(p, exp2(load(p) - lse));
      return;
    }
    if (first) {
      vf total = {};
      for (int64_t j = 0; j < keys; ++j) total += load(e + j * kPanel);
      store(t.shift + query, total * (kLn2 / static_cast<float>(keys)));
    }
    const vf shift = load(t.shift + query);
    KeySum sum;
    for (int64_t j = 0; j < keys; ++j, p += kPanel, e += kPanel) {
      const vf weight = exp2(load(p) - lse), moved = weight * (load(e) * kLn2 - shift);
      store(p, weight);
      store(e, moved);
      sum.add(j, moved);
    }
    sum.flush();
    store(t.sum + query, load(t.sum + query) + sum.total);
  }

  void finish() {
    for (int64_t i = 0; moves && i < queries.size(); i += kPanel) {
      const TokenRun rows = piece(queries, i, kPanel);
      gather_run(segment.out, group.sample, head, rows, t.stage);
      for (int64_t r = 0; r < rows.size(); ++r) {
        float* at = t.out.at(i + r, 0).data;
        const vf sum = splat(t.sum[i + r]);
        for (int64_t c = 0; c < row; c += W) store(at + c, load(at + c) - sum * load(t.stage.at(r, c).data));
      }
    }
    scatter_run(segment.dout, group.sample, head, queries, t.out, 1);
    const bool blind = group.count == 0;
    for_each_row(segment.dlse, group.sample, head, queries,
                 [&](char* at, int64_t i) { *reinterpret_cast<float*>(at) = blind ? 0 : t.sum[i] + t.shift[i]; });
  }
};

struct Job {
  const FrameTangents& a;
  TokenTiles tiles;

  void run(int64_t i) const {
    const TokenTiles::Item item = tiles.at(i);
    const int64_t row = round_up(a.segment[0].q.size[4]);
    Arena count(nullptr);
    Tiles(row, count);
    Arena arena(scratch(count.used()));
    Tangents(a, Tiles(row, arena), item.group, item.head, item.tokens).run();
  }
};

}  // namespace

void frame_attention_tangents(const FrameTangents& a) {
  Job job{a, TokenTiles(a.groups->queries, a.segment[0].q.size[3], kQueryTile)};
  parallel_for(
      job.tiles.items(), a.threads, [](void* p, int64_t item) { static_cast<const Job*>(p)->run(item); }, &job);
}

}  // namespace vdcore::cpu::VDCORE_ISA
