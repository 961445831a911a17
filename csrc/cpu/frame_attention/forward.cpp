// Frame attention, forward: a tile of query tokens against all the key tokens that its group sees, key tile by key
// tile, with the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022). Groups see whole runs, so that no tile
// knows of a mask and the work is that of the visible pairs.
//
// Queries go in panels of three vectors: a panel's scores against a key tile stay in L1 from the first product through
// the softmax to the second, and three vectors are what the register block of a product holds best.
#include "common/threads.h"
#include "cpu/frame_attention/frame_attention.h"
#include "cpu/frame_attention/tiles.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

constexpr int64_t kPanel = 3 * W;
constexpr int64_t kQueryTile = 192 / kPanel * kPanel;  // shares one gathering of the keys
constexpr int64_t kKeyTile = 128;

struct Tiles {
  Tile queries;  // per panel (row, kPanel): transposed, times scale and log2(e)
  Tile stage;    // (kPanel, row)
  Tile k, v;     // (kKeyTile, row)
  Tile scores;   // (kKeyTile, kPanel)
  Tile out;      // (kQueryTile, row)
  float *maximum, *sum;

  Tiles(int64_t row, Arena& arena) {
    queries = {arena.floats(kQueryTile * row), kPanel};
    stage = {arena.floats(kPanel * row), row};
    k = {arena.floats(kKeyTile * row), row};
    v = {arena.floats(kKeyTile * row), row};
    scores = {arena.floats(kKeyTile * kPanel), kPanel};
    out = {arena.floats(kQueryTile * row), row};
    maximum = arena.floats(kQueryTile);
    sum = arena.floats(kQueryTile);
  }
  Tile panel(int64_t first_query, int64_t row) const { return {queries.data + first_query * row, kPanel}; }
};

// Scores of one vector of queries become exp2(score - maximum), in place; returns the factor for what was summed up
// before.
VDCORE_INLINE vf softmax_keys(float* column, int64_t keys, float* maximum, float* sum) {
  const vf before = load(maximum);
  vf top = before;
  for (int64_t j = 0; j < keys; ++j) top = max(top, load(column + j * kPanel));
  const vf base = select(top == -kInf, vf{}, top);  // all scores -inf: exp2(-inf - 0) is 0, not NaN
  const vf factor = exp2(before - base);
  vf total = {};
  for (int64_t j = 0; j < keys; ++j) {
    const vf p = exp2(load(column + j * kPanel) - base);
    total += p;
    store(column + j * kPanel, p);
  }
  store(maximum, top);
  store(sum, load(sum) * factor + total);
  return factor;
}

class Forward {
 public:
  Forward(const FrameAttention& args, const Tiles& tiles, const TokenGroup& group, int64_t head, TokenRun queries)
      : a(args),
        t(tiles),
        group(group),
        segment(args.of(queries)),
        queries(queries),
        head(head),
        kv_head(head / (segment.q.size[3] / segment.k.size[3])),
        D(segment.q.size[4]),
        row(round_up(D)) {}

  void run() {
    load_queries();
    bool first = true;
    for (int i = 0; i < group.count; ++i) {
      const TokenRun& keys = group.runs[i];
      for (int64_t j = 0; j < keys.size(); j += kKeyTile) {
        attend(piece(keys, j, kKeyTile), first);
        first = false;
      }
    }
    if (first) memset(t.out.data, 0, queries.size() * row * sizeof(float));
    finish();
  }

 private:
  const FrameAttention& a;
  const Tiles& t;
  const TokenGroup& group;
  const FrameSegment& segment;
  const TokenRun queries;
  const int64_t head, kv_head, D, row;

  void load_queries() {
    for (int64_t i = 0; i < queries.size(); i += kPanel) {
      const TokenRun rows = piece(queries, i, kPanel);
      gather_run(segment.q, group.sample, head, rows, t.stage);
      transpose(rows.size(), D, t.stage, a.scale * kLog2E, t.panel(i, row));
    }
    for (int64_t i = 0; i < kQueryTile; i += W) {
      store(t.maximum + i, splat(-kInf));
      store(t.sum + i, vf{});
    }
  }

  void attend(TokenRun keys, bool first) {
    const FrameSegment& from = a.of(keys);
    gather_run(from.k, group.sample, kv_head, keys, t.k);
    gather_run(from.v, group.sample, kv_head, keys, t.v);
    NoPrefetch none;
    for (int64_t i = 0; i < queries.size(); i += kPanel) {
      const int64_t rows = smaller(kPanel, queries.size() - i), lanes = round_up(rows);
      score_product(keys.size(), lanes, D, {t.k.data, row, 1}, t.panel(i, row), t.scores, none);
      for (int64_t lane = 0; lane < lanes; lane += W) {
        const vf factor = softmax_keys(t.scores.data + lane, keys.size(), t.maximum + i + lane, t.sum + i + lane);
        if (!first) rescale(i + lane, smaller(W, rows - lane), factor);
      }
      product(rows, row, keys.size(), {t.scores.data, 1, kPanel}, t.v, t.out.at(i, 0), !first, none);
    }
  }

  void rescale(int64_t first_row, int64_t rows, vf factor) {
    float lanes[W];
    store(lanes, factor);
    for (int64_t i = 0; i < rows; ++i) {
      if (lanes[i] == 1.f) continue;
      float* at = t.out.at(first_row + i, 0).data;
      for (int64_t c = 0; c < row; c += W) store(at + c, load(at + c) * lanes[i]);
    }
  }

  void finish() {
    for (int64_t i = 0; i < queries.size(); ++i) {
      const float factor = t.sum[i] == 0 ? 0 : 1 / t.sum[i];
      float* at = t.out.at(i, 0).data;
      for (int64_t c = 0; c < row; c += W) store(at + c, load(at + c) * factor);
    }
    if (segment.spatial) scatter_run(segment.spatial, group.sample, head, queries, t.out, 1);
    if (a.gate) mix();
    scatter_run(segment.out, group.sample, head, queries, t.out, 1);
    if (!segment.lse) return;
    for (int64_t i = 0; i < queries.size(); i += W)
      store(t.sum + i, log_sum_exp({load(t.maximum + i), load(t.sum + i)}));
    for_each_row(segment.lse, group.sample, head, queries,
                 [&](char* at, int64_t i) { *reinterpret_cast<float*>(at) = t.sum[i]; });
  }

  // What lies in out is the temporal result.
  void mix() {
    with_dtype(a.gate.dtype, [&](auto gate_type) {
      with_dtype(segment.out.dtype, [&](auto type) {
        for_each_row(segment.out, group.sample, head, queries, [&](const char* other, int64_t i) {
          const int64_t token = queries.begin + i, per_frame = segment.out.size[2];
          const char* gate = a.gate.at(group.sample, token / per_frame, token % per_frame, head);
          mix_row<decltype(gate_type)::value, decltype(type)::value>(gate, other, t.out.at(i, 0).data);
        });
      });
    });
  }
  template <DType Gate, DType Out>
  void mix_row(const char* gate, const char* other, float* out) {
    float *gates = t.stage.data, *others = t.stage.at(1, 0).data;
    read_row<Out>(other, D, others);
    if (a.gate.stride[4] == 0) {
      read_row<Gate>(gate, 1, gates);
      const vf g = splat(gates[0]);
      for (int64_t c = 0; c < row; c += W) store(out + c, g * load(out + c) + (1.f - g) * load(others + c));
      return;
    }
    read_row<Gate>(gate, D, gates);
    for (int64_t c = 0; c < row; c += W) {
      const vf g = load(gates + c);
      store(out + c, g * load(out + c) + (1.f - g) * load(others + c));
    }
  }
};

struct Job {
  const FrameAttention& a;
  TokenTiles tiles;

  void run(int64_t i) const {
    const TokenTiles::Item item = tiles.at(i);
    const int64_t row = round_up(a.segment[0].q.size[4]);
    Arena count(nullptr);
    Tiles(row, count);
    Arena arena(scratch(count.used()));
    Forward(a, Tiles(row, arena), item.group, item.head, item.tokens).run();
  }
};

}  // namespace

void frame_attention_forward(const FrameAttention& a) {
  Job job{a, TokenTiles(a.groups->queries, a.segment[0].q.size[3], kQueryTile)};
  parallel_for(
      job.tiles.items(), a.threads, [](void* p, int64_t item) { static_cast<const Job*>(p)->run(item); }, &job);
}

}  // namespace vdcore::cpu::VDCORE_ISA
