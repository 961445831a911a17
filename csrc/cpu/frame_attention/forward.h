// Frame attention, forward: a tile of query tokens against all the key tokens that its group sees, key tile by key
// tile, with the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022). Groups see whole runs, so that no tile
// knows of a mask and the work is that of the visible pairs.
//
// `Products` is how a tile of queries meets one of keys: in vectors, or in AMX's tiles.
#pragma once

#include "cpu/frame_attention/frame_attention.h"
#include "cpu/frame_attention/job.h"

namespace vdcore::cpu::VDCORE_ISA {

// What a tile of queries comes to.
struct QueryResults {
  Tile out;              // (queries, row): sums of exp2(score - maximum) * v
  Tile stage;            // two rows
  float *maximum, *sum;  // of scores in base 2; of exp2(score - maximum)
  float* center;         // (row,): what has been subtracted from every value

  QueryResults(int64_t queries, int64_t row, Arena& arena) {
    out = {arena.floats(queries * row), row};
    stage = {arena.floats(2 * row), row};
    maximum = arena.floats(queries);
    sum = arena.floats(queries);
    center = arena.floats(row);
  }
};

// A Products has kQueryTile and kKeyTile, and
//   Products(D, arena); results(): QueryResults
//   kCenters: whether attend() subtracts results().center from values
//   load_queries(q, sample, head, tokens, scale)
//   attend(k, v, sample, kv_head, tokens, queries, first): whether these are the first keys
//   finish(queries): results() is complete
template <typename TileProducts>
class Forward {
 public:
  using Arguments = FrameAttention;
  using Products = TileProducts;

  Forward(const FrameAttention& args, Products& products, const TokenGroup& group, int64_t head, TokenRun queries)
      : a(args),
        products(products),
        t(products.results()),
        group(group),
        segment(args.of(queries)),
        queries(queries),
        head(head),
        kv_head(head / (segment.q.size[3] / segment.k.size[3])),
        D(segment.q.size[4]),
        row(round_up(D)) {}

  void run() {
    for (int64_t i = 0; i < Products::kQueryTile; i += W) {
      store(t.maximum + i, splat(-kInf));
      store(t.sum + i, vf{});
    }
    find_center();
    products.load_queries(segment.q, group.sample, head, queries, a.scale);
    bool first = true;
    for (int i = 0; i < group.count; ++i) {
      const TokenRun& keys = group.runs[i];
      for (int64_t j = 0; j < keys.size(); j += Products::kKeyTile) {
        const FrameSegment& from = a.of(keys);
        products.attend(from.k, from.v, group.sample, kv_head, piece(keys, j, Products::kKeyTile), queries.size(),
                        first);
        first = false;
      }
    }
    if (first)
      memset(t.out.data, 0, queries.size() * row * sizeof(float));
    else
      products.finish(queries.size());
    finish();
  }

 private:
  const FrameAttention& a;
  Products& products;
  const QueryResults& t;
  const TokenGroup& group;
  const FrameSegment& segment;
  const TokenRun queries;
  const int64_t head, kv_head, D, row;

  // Values with a mean, as features after an activation have one: sums of what is left of them without it stay small,
  // and so do rounding errors, which the gradient of a norm's weight would collect from all rows. The mean of some of
  // the values that the group sees, evenly spread; what it does not see may be NaN. 0 where that mean is less than
  // their spread: the results may then be much smaller than it, and so must their errors be. Of 16 values without a
  // mean one channel in 700 had as large a mean by chance, and sums of 15,000 erred ten times as much for it; of 33 to
  // 64 one in 300,000 has at most. A matter of float32: other dtypes round their results more than that.
  void find_center() const {
    memset(t.center, 0, row * sizeof(float));
    if (!Products::kCenters || segment.v.dtype != DType::f32) return;
    int64_t seen = 0, count = 0;
    for (int i = 0; i < group.count; ++i) seen += group.runs[i].size();
    // Backward then has all keys of a row at hand and asks for no exact result. See backward.h.
    const bool alone = a.groups->components.end() - a.groups->components.begin() ==
                       a.groups->queries.end() - a.groups->queries.begin();
    if (alone && group.count == 1 && seen <= Products::kKeyTile) return;
    const int64_t step = (seen + kCenterValues - 1) / kCenterValues;
    const Tile squares = t.stage.at(1, 0);
    memset(squares.data, 0, row * sizeof(float));
    for (int i = 0; i < group.count; ++i)
      for (int64_t j = 0; j < group.runs[i].size(); j += step, ++count) {
        const TokenRun one = piece(group.runs[i], j, 1);
        gather_run(a.of(one).v, group.sample, kv_head, one, t.stage);
        for (int64_t c = 0; c < row; c += W) {
          const vf x = load(t.stage.data + c);
          store(t.center + c, load(t.center + c) + x);
          store(squares.data + c, load(squares.data + c) + x * x);
        }
      }
    for (int64_t c = 0; c < row && count; c += W) {
      const vf mean = load(t.center + c) / static_cast<float>(count);
      const vf square = load(squares.data + c) / static_cast<float>(count);
      store(t.center + c, select(2.f * mean * mean > square, mean, vf{}));  // 0 for infinity and NaN, too
    }
  }

  void finish() {
    for (int64_t i = 0; i < queries.size(); ++i) {
      const float factor = t.sum[i] == 0 ? 0 : 1 / t.sum[i];
      float* at = t.out.at(i, 0).data;
      for (int64_t c = 0; c < row; c += W)
        store(at + c, load(at + c) * factor + (factor == 0 ? vf{} : load(t.center + c)));
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

}  // namespace vdcore::cpu::VDCORE_ISA
