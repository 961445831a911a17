// Frame attention, backward: with P recomputed from lse and delta = rowsum(dout * out) - dlse,
//   dV = P^T dO,   dS = P * (dO V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q.
// out has been rounded, so delta errs, by the same for all keys of a row; that alone would reach dQ as an error times
// the keys' mean, several times the others where keys have one. But a row of dS adds up to dlse: what it does add up to
// shows the error, and dQ = scale (dS (K - c) + dlse c), with c about the mean of the keys that a row sees, is free of
// it.
// A worker that owns a component (see token_groups.h) goes through its keys once and adds dq up in float32: five
// products. Few components are shared: each of several workers takes a part of the keys, with a dq of its own, and
// these are added up in order. Where that would take much memory, dq and dk, dv take a pass each: seven products, in
// which every tile has one owner. The parts depend on sizes alone, so the bits never depend on threads.
//
// `Products` is how a tile of queries meets one of keys: in vectors, or in AMX's tiles.
#pragma once

#include <atomic>

#include "common/threads.h"
#include "cpu/frame_attention/frame_attention.h"
#include "cpu/frame_attention/tiles.h"

namespace vdcore::cpu::VDCORE_ISA {

struct BackwardTiles {
  static constexpr int64_t kQueryTile = 6 * W;
  static constexpr int64_t kKeyTile = 128;
  static constexpr int64_t kKeysOfMean =
      32;  // a sixth of the keys' spread is left; costs a row of 2 * kKeyTile of them

  Tile q, dout;               // (kQueryTile, row)
  Tile k, v, dk, dv;          // (kKeyTile, row)
  Tile p, ds;                 // (kKeyTile, kQueryTile)
  Tile dq;                    // (kQueryTile, row), for the pass that has no other place
  float *lse, *delta;         // (kQueryTile,); lse in base 2
  float *tile_sum, *row_sum;  // (kQueryTile,): of dS over a tile of keys, and over all
  float* mean;                // (row,), of keys

  BackwardTiles(int64_t row, Arena& arena) {
    for (Tile* tile : {&q, &dout, &dq}) *tile = {arena.floats(kQueryTile * row), row};
    for (Tile* tile : {&k, &v, &dk, &dv}) *tile = {arena.floats(kKeyTile * row), row};
    for (Tile* tile : {&p, &ds}) *tile = {arena.floats(kKeyTile * kQueryTile), kQueryTile};
    for (float** p : {&lse, &delta, &tile_sum, &row_sum}) *p = arena.floats(kQueryTile);
    mean = arena.floats(row);
  }
};

// A Products has
//   Products(D, arena); tiles(): BackwardTiles
//   load_queries(q, dout, sample, head, tokens, scale), load_keys(k, v, sample, kv_head, tokens)
//   lanes(queries): that scores have; score_factor(): from one of p to a score in base 2
//   scores(queries, keys): p = K Q^T over that factor, ds = V dO^T
//   weighed(queries, keys): p and ds hold P and dS now
//   key_gradients(queries, keys, first): dv = or += P^T dO, dk = or += dS^T Q
//   query_gradient(queries, keys, dq, accumulate): dq = or += dS K
template <typename Products>
class Backward {
 public:
  Backward(const FrameAttention& args, Products& products)
      : a(args),
        products(products),
        t(products.tiles()),
        H(args.segment[0].q.size[3]),
        heads(H / args.segment[0].k.size[3]),
        D(args.segment[0].q.size[4]),
        row(round_up(D)),
        video_rows(args.segment[0].q.size[1] * args.segment[0].q.size[2]),
        all_rows(video_rows + (args.segment[1].q ? args.segment[1].q.size[2] : 0)) {}

  // With all keys of a query in one tile, rowsum(P * dP) is delta too, and the more exact one: its rounding errors
  // cancel in dP - delta. What find_delta() then leaves is -dlse.
  static bool at_hand(const TokenComponent& c) { return c.seen_groups == 1 && c.seen_keys <= kKeyTile; }

  void find_delta(int64_t b, int64_t head, TokenRun queries, bool keys_at_hand) const {
    const FrameSegment& from = a.of(queries);
    for (int64_t i = 0; i < queries.size(); i += kQueryTile) {
      const TokenRun rows = piece(queries, i, kQueryTile);
      float* delta = delta_of(b, head, rows);
      memset(delta, 0, rows.size() * sizeof(float));
      if (!keys_at_hand) {
        gather_run(from.out, b, head, rows, t.q);
        gather_run(from.dout, b, head, rows, t.dout);
      }
      for (int64_t r = 0; r < rows.size() && !keys_at_hand; ++r) {
        const float *out = t.q.at(r, 0).data, *dout = t.dout.at(r, 0).data;
        double total = 0;
        for (int64_t c = 0; c < D; ++c) total += static_cast<double>(out[c]) * dout[c];
        delta[r] = static_cast<float>(total);
      }
      if (from.dlse)
        for_each_row(from.dlse, b, head, rows,
                     [&](const char* at, int64_t r) { delta[r] -= *reinterpret_cast<const float*>(at); });
    }
  }

  // All gradients of a component for one key/value head; `dq` holds its query rows head by head, the video's first,
  // and then the sums of their rows of dS.
  void one_pass(const TokenComponent& c, int64_t kv_head, float* dq) const {
    find_deltas(c, kv_head);
    part_of_keys(c, kv_head, 0, 1, dq);
    scatter_queries(c, kv_head, dq);
  }

  void find_deltas(const TokenComponent& c, int64_t kv_head) const {
    for (int64_t h = 0; h < heads; ++h) {
      find_delta(c.sample, kv_head * heads + h, video_of(c), at_hand(c));
      find_delta(c.sample, kv_head * heads + h, text_of(c), at_hand(c));
    }
  }

  // dk and dv of a part of the component's tiles of keys, and what they give to dq.
  void part_of_keys(const TokenComponent& c, int64_t kv_head, int64_t part, int64_t parts, float* dq) const {
    const int64_t all = tiles_of_keys(c), first = all * part / parts, last = all * (part + 1) / parts;
    memset(dq, 0, dq_floats(c) * sizeof(float));
    const auto dq_rows = [&](int64_t h, const TokenRun& queries) { return rows_of(c, h, queries, dq); };
    int64_t tile = 0;
    for (int64_t i = c.first_group; i < c.end_group; ++i) {
      const TokenGroup& group = a.groups->keys.data()[i];
      for (int64_t j = 0; j < group.tokens.size(); j += kKeyTile, ++tile)
        if (tile >= first && tile < last)
          key_tile(group, kv_head, piece(group.tokens, j, kKeyTile), at_hand(c), dq_rows);
    }
  }

  void scatter_queries(const TokenComponent& c, int64_t kv_head, float* dq) const {
    a.groups->for_each_queries(c, [&](const TokenGroup& group, const TokenRun& queries) {
      const bool correct = group.count && !at_hand(c);
      if (correct) find_mean(group, kv_head);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = kv_head * heads + h;
        const QueryRows rows = rows_of(c, h, queries, dq);
        if (correct) correct_rows(c.sample, head, queries, rows);
        scatter_run(a.of(queries).dq, c.sample, head, queries, rows.dq, a.scale);
      }
    });
  }

  int64_t dq_floats(const TokenComponent& c) const { return round_up(heads * c.queries() * (row + 1)); }

  // dk and dv of a tile of keys.
  void keys_alone(const TokenGroup& group, int64_t kv_head, TokenRun keys) const {
    key_tile(group, kv_head, keys, false,
             [](int64_t, const TokenRun&) -> QueryRows { return {{nullptr, 0}, nullptr}; });
  }

  // dq of a tile of queries.
  void queries_alone(const TokenGroup& group, int64_t head, TokenRun queries) const {
    const FrameSegment& from = a.of(queries);
    load_queries(group.sample, head, queries);
    memset(t.row_sum, 0, kQueryTile * sizeof(float));
    bool first = true;
    for (int i = 0; i < group.count; ++i)
      for (int64_t j = 0; j < group.runs[i].size(); j += kKeyTile) {
        const TokenRun keys = piece(group.runs[i], j, kKeyTile);
        load_keys(group.sample, head / heads, keys);
        weights(queries.size(), keys.size(), false);
        query_gradient(queries.size(), keys.size(), {t.dq, t.row_sum}, !first);
        first = false;
      }
    find_mean(group, head / heads);
    correct_rows(group.sample, head, queries, {t.dq, t.row_sum});
    scatter_run(from.dq, group.sample, head, queries, t.dq, a.scale);
  }

 private:
  struct QueryRows {
    Tile dq;
    float* row_sum;  // of dS
  };

  static constexpr int64_t kQueryTile = BackwardTiles::kQueryTile, kKeyTile = BackwardTiles::kKeyTile;

  const FrameAttention& a;
  Products& products;
  const BackwardTiles& t;
  const int64_t H, heads, D, row, video_rows, all_rows;  // heads: query heads of a key/value head

  static TokenRun video_of(const TokenComponent& c) { return {false, c.video.begin, c.video.end}; }
  static TokenRun text_of(const TokenComponent& c) { return {true, c.text.begin, c.text.end}; }

  int64_t tiles_of_keys(const TokenComponent& c) const {
    int64_t tiles = 0;
    for (int64_t i = c.first_group; i < c.end_group; ++i)
      tiles += (a.groups->keys.data()[i].tokens.size() + kKeyTile - 1) / kKeyTile;
    return tiles;
  }

  QueryRows rows_of(const TokenComponent& c, int64_t h, const TokenRun& queries, float* dq) const {
    const int64_t in_head =
        queries.text ? c.video.size() + queries.begin - c.text.begin : queries.begin - c.video.begin;
    const int64_t at = h * c.queries() + in_head;
    return {{dq + at * row, row}, dq + heads * c.queries() * row + at};
  }

  // t.mean = c of a group: the mean of some of the keys that it sees, evenly spread. What it does not see may be NaN.
  void find_mean(const TokenGroup& group, int64_t kv_head) const {
    int64_t seen = 0, count = 0;
    for (int i = 0; i < group.count; ++i) seen += group.runs[i].size();
    const int64_t step = (seen + t.kKeysOfMean - 1) / t.kKeysOfMean;
    memset(t.mean, 0, row * sizeof(float));
    for (int i = 0; i < group.count; ++i)
      for (int64_t j = 0; j < group.runs[i].size(); j += step, ++count) {
        const TokenRun key = piece(group.runs[i], j, 1);
        gather_run(a.of(key).k, group.sample, kv_head, key, t.k);
        for (int64_t c = 0; c < row; c += W) store(t.mean + c, load(t.mean + c) + load(t.k.data + c));
      }
    for (int64_t c = 0; c < row; c += W) store(t.mean + c, load(t.mean + c) / static_cast<float>(count));
  }

  // dq -= (row sum of dS - dlse) c.
  void correct_rows(int64_t b, int64_t head, TokenRun queries, const QueryRows& rows) const {
    if (const TensorView& dlse = a.of(queries).dlse)
      for_each_row(dlse, b, head, queries,
                   [&](const char* at, int64_t i) { rows.row_sum[i] -= *reinterpret_cast<const float*>(at); });
    for (int64_t i = 0; i < queries.size(); ++i) {
      float* at = rows.dq.at(i, 0).data;
      for (int64_t c = 0; c < row; c += W) store(at + c, load(at + c) - rows.row_sum[i] * load(t.mean + c));
    }
  }

  float* delta_of(int64_t b, int64_t head, const TokenRun& queries) const {
    return a.delta + (b * H + head) * all_rows + (queries.text ? video_rows : 0) + queries.begin;
  }

  void load_keys(int64_t b, int64_t kv_head, TokenRun keys) const {
    products.load_keys(a.of(keys).k, a.of(keys).v, b, kv_head, keys);
  }

  void load_queries(int64_t b, int64_t head, TokenRun queries) const {
    const FrameSegment& from = a.of(queries);
    products.load_queries(from.q, from.dout, b, head, queries, a.scale);
    for (int64_t i = 0; i < kQueryTile; ++i) t.lse[i] = kInf, t.delta[i] = 0;  // padding: exp2(0 - inf) is 0
    for_each_row(from.lse, b, head, queries, [&](const char* at, int64_t i) {
      const float lse = *reinterpret_cast<const float*>(at) * kLog2E;
      t.lse[i] = lse == -kInf ? kInf : lse;
    });
    memcpy(t.delta, delta_of(b, head, queries), queries.size() * sizeof(float));
  }

  // t.p = P, t.ds = dS and t.tile_sum its row sums, of the loaded queries and keys.
  void weights(int64_t queries, int64_t keys, bool keys_at_hand) const {
    products.scores(queries, keys);
    const float factor = products.score_factor();
    for (int64_t i = 0; i < products.lanes(queries); i += W) {
      float *p = t.p.data + i, *ds = t.ds.data + i;
      const vf lse = load(t.lse + i);
      const vf delta = load(t.delta + i);
      vf total = {};
      if (keys_at_hand) {
        KeySum sum, weighted;
        for (int64_t j = 0; j < keys; ++j) {
          const vf weight = exp2(load(p + j * kQueryTile) * factor - lse);
          sum.add(j, weight);
          weighted.add(j, weight * load(ds + j * kQueryTile));
          store(p + j * kQueryTile, weight);
        }
        const RowGradients row(sum, weighted, delta);
        for (int64_t j = 0; j < keys; ++j) {
          vf weight = load(p + j * kQueryTile), gradient = load(ds + j * kQueryTile);
          row.apply(weight, gradient);
          store(p + j * kQueryTile, weight);
          store(ds + j * kQueryTile, gradient);
        }
        continue;
      }
      for (int64_t j = 0; j < keys; ++j) {
        const vf weight = exp2(load(p + j * kQueryTile) * factor - lse);
        store(p + j * kQueryTile, weight);
        const vf gradient = weight * (load(ds + j * kQueryTile) - delta);
        store(ds + j * kQueryTile, gradient);
        total += gradient;
      }
      store(t.tile_sum + i, total);
    }
    products.weighed(queries, keys);
  }

  void query_gradient(int64_t queries, int64_t keys, const QueryRows& rows, bool accumulate) const {
    products.query_gradient(queries, keys, rows.dq, accumulate);
    for (int64_t i = 0; i < queries; ++i) rows.row_sum[i] += t.tile_sum[i];
  }

  template <typename RowsOf>
  void key_tile(const TokenGroup& group, int64_t kv_head, TokenRun keys, bool keys_at_hand,
                const RowsOf& dq_rows) const {
    const FrameSegment& from = a.of(keys);
    bool first = true;
    if (group.count) load_keys(group.sample, kv_head, keys);
    for (int64_t h = 0; h < heads; ++h)
      for (int i = 0; i < group.count; ++i)
        for (int64_t j = 0; j < group.runs[i].size(); j += kQueryTile) {
          const TokenRun queries = piece(group.runs[i], j, kQueryTile);
          const int64_t rows = queries.size();
          load_queries(group.sample, kv_head * heads + h, queries);
          weights(rows, keys.size(), keys_at_hand);
          products.key_gradients(rows, keys.size(), first);
          first = false;
          if (const QueryRows to = dq_rows(h, queries); to.dq.data) query_gradient(rows, keys.size(), to, true);
        }
    if (first) return clear_run(from.dk, group.sample, kv_head, keys), clear_run(from.dv, group.sample, kv_head, keys);
    scatter_run(from.dk, group.sample, kv_head, keys, t.dk, a.scale);
    scatter_run(from.dv, group.sample, kv_head, keys, t.dv, 1);
  }
};

template <typename Products, typename Body>
void with_tiles(const FrameAttention& a, const Body& body) {
  const int64_t D = a.segment[0].q.size[4];
  Arena count(nullptr);
  Products(D, count);
  Arena arena(scratch(count.used()));
  Products products(D, arena);
  body(Backward<Products>(a, products));
}

template <typename Products>
struct OnePass {
  const FrameAttention& a;
  std::atomic<int64_t> next{0};

  void work(int64_t worker) {
    const int64_t G = a.segment[0].k.size[3], items = a.groups->components.size() * G;
    with_tiles<Products>(a, [&](const Backward<Products>& backward) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;)
        backward.one_pass(a.groups->components.data()[i / G], i % G, a.workspace + worker * a.workspace_floats);
    });
  }
};

template <typename Products>
struct SharedComponents {
  static constexpr int64_t kPieces = 16;  // of a sum over parts

  const FrameAttention& a;
  const int64_t G = a.segment[0].k.size[3], items = static_cast<int64_t>(a.groups->components.size()) * G;

  void run() {
    each<&SharedComponents::find_deltas>(items);
    each<&SharedComponents::part_of_keys>(items * a.parts);
    each<&SharedComponents::add_parts>(items * kPieces);
    each<&SharedComponents::scatter>(items);
  }

 private:
  const TokenComponent& component(int64_t item) const { return a.groups->components.data()[item / G]; }
  float* dq(int64_t item, int64_t part) const { return a.workspace + (item * a.parts + part) * a.workspace_floats; }

  template <void (SharedComponents::*step)(int64_t) const>
  void each(int64_t count) {
    parallel_for(count, a.threads, [](void* p, int64_t i) { (static_cast<SharedComponents*>(p)->*step)(i); }, this);
  }
  void find_deltas(int64_t item) const {
    with_tiles<Products>(a,
                         [&](const Backward<Products>& backward) { backward.find_deltas(component(item), item % G); });
  }
  void part_of_keys(int64_t i) const {
    const int64_t item = i / a.parts, part = i % a.parts;
    with_tiles<Products>(a, [&](const Backward<Products>& backward) {
      backward.part_of_keys(component(item), item % G, part, a.parts, dq(item, part));
    });
  }
  void add_parts(int64_t i) const {
    const int64_t item = i / kPieces, piece = i % kPieces;
    with_tiles<Products>(a, [&](const Backward<Products>& backward) {
      const int64_t vectors = backward.dq_floats(component(item)) / W;
      for (int64_t v = vectors * piece / kPieces; v < vectors * (piece + 1) / kPieces; ++v) {
        vf total = load(dq(item, 0) + v * W);
        for (int64_t part = 1; part < a.parts; ++part) total += load(dq(item, part) + v * W);
        store(dq(item, 0) + v * W, total);
      }
    });
  }
  void scatter(int64_t item) const {
    with_tiles<Products>(a, [&](const Backward<Products>& backward) {
      backward.scatter_queries(component(item), item % G, dq(item, 0));
    });
  }
};

template <typename Products>
struct TwoPasses {
  const FrameAttention& a;
  TokenTiles queries, keys;

  void run() {
    parallel_for(
        queries.items(), a.threads, [](void* p, int64_t i) { static_cast<TwoPasses*>(p)->query_tile(i); }, this);
    parallel_for(keys.items(), a.threads, [](void* p, int64_t i) { static_cast<TwoPasses*>(p)->key_tile(i); }, this);
  }

 private:
  void query_tile(int64_t i) const {
    const TokenTiles::Item item = queries.at(i);
    if (!item.group.count) return;
    with_tiles<Products>(a, [&](const Backward<Products>& backward) {
      backward.find_delta(item.group.sample, item.head, item.tokens, false);
      backward.queries_alone(item.group, item.head, item.tokens);
    });
  }
  void key_tile(int64_t i) const {
    const TokenTiles::Item item = keys.at(i);
    with_tiles<Products>(
        a, [&](const Backward<Products>& backward) { backward.keys_alone(item.group, item.head, item.tokens); });
  }
};

template <typename Products>
void run_backward(const FrameAttention& a) {
  const int64_t H = a.segment[0].q.size[3], G = a.segment[0].k.size[3];
  // Queries that see nothing belong to no component.
  for (int64_t i = 0; i < static_cast<int64_t>(a.groups->queries.size()); ++i) {
    const TokenGroup& group = a.groups->queries.data()[i];
    for (int64_t h = 0; h < H && !group.count; ++h) clear_run(a.of(group.tokens).dq, group.sample, h, group.tokens);
  }
  if (a.workspace && a.parts > 1) {
    SharedComponents<Products>{a}.run();
  } else if (a.workspace) {
    OnePass<Products> pass{a};
    parallel_for(
        a.workers, a.threads, [](void* p, int64_t worker) { static_cast<OnePass<Products>*>(p)->work(worker); }, &pass);
  } else {
    TwoPasses<Products>{
        a, {a.groups->queries, H, BackwardTiles::kQueryTile}, {a.groups->keys, G, BackwardTiles::kKeyTile}}
        .run();
  }
}

}  // namespace vdcore::cpu::VDCORE_ISA
