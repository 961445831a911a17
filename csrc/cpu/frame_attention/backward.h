// Frame attention, backward: with P recomputed from lse and delta = rowsum(dout * out) - dlse,
//   dV = P^T dO,   dS = P * (dO V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q.
// out has been rounded, so delta errs, by the same for all keys of a row; that alone would reach dQ as an error times
// the keys' mean, several times the others where keys have one. But a row of dS adds up to dlse: what it does add up to
// shows the error, and dQ = scale (dS (K - c) + dlse c), with c about the mean of the keys that a row sees, is free of
// it.
// A worker goes through a component's tiles of keys and adds dq up in float32: five products. backward_plan.h says who
// takes which.
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
  static constexpr int64_t kKeyTile = BackwardPlan::kKeyTile;
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

  // Some of a component's queries, counted through its video and then its text; float32 rows for their gradients, head
  // by head, and then the sums of their rows of dS.
  struct Part {
    Run rows;
    float* dq;
  };

  void find_deltas(const TokenComponent& c, int64_t kv_head, Run rows) const {
    for (int64_t h = 0; h < heads; ++h)
      for (const bool text : {false, true})
        find_delta(c.sample, kv_head * heads + h, tokens_of(c, text, rows), at_hand(c));
  }

  int64_t rows_of(const Part& part) const { return heads * part.rows.size(); }
  // Sets rows [from, to) of dq to 0.
  void clear_queries(const Part& part, int64_t from, int64_t to) const {
    if (from >= to) return;
    memset(part.dq + from * row, 0, (to - from) * row * sizeof(float));
    memset(part.dq + rows_of(part) * row + from, 0, (to - from) * sizeof(float));
  }

  // Where a tile of keys puts its gradients: in their place; or in `sums`, of one part of the queries.
  void finish_keys(const TokenGroup& group, int64_t kv_head, TokenRun keys, bool seen, float* sums) const {
    const FrameSegment& from = a.of(keys);
    if (sums) {
      for (const Tile& tile : {t.dk, t.dv}) {
        if (seen)
          memcpy(sums, tile.data, keys.size() * row * sizeof(float));
        else
          memset(sums, 0, keys.size() * row * sizeof(float));
        sums += kKeyTile * row;
      }
      return;
    }
    if (!seen) return clear_run(from.dk, group.sample, kv_head, keys), clear_run(from.dv, group.sample, kv_head, keys);
    scatter_run(from.dk, group.sample, kv_head, keys, t.dk, a.scale);
    scatter_run(from.dv, group.sample, kv_head, keys, t.dv, 1);
  }

  // A tile of keys against a part of the queries. Before it adds to rows up to an end it calls turn.comes(end), and
  // turn.passes(end) after it.
  template <typename Turn>
  void key_tile(const TokenComponent& c, const TokenGroup& group, int64_t kv_head, TokenRun keys, const Part& part,
                const Turn& turn, float* sums) const {
    bool seen = false;
    for (int64_t h = 0; h < heads; ++h)
      for (int i = 0; i < group.count; ++i) {
        const TokenRun run = clip(c, group.runs[i], part.rows);
        for (int64_t j = 0; j < run.size(); j += kQueryTile) {
          const TokenRun queries = piece(run, j, kQueryTile);
          const int64_t rows = queries.size(), first = h * part.rows.size() + row_in(c, queries) - part.rows.begin;
          if (!seen) load_keys(group.sample, kv_head, keys);
          load_queries(group.sample, kv_head * heads + h, queries);
          weights(rows, keys.size(), at_hand(c));
          products.key_gradients(rows, keys.size(), !seen);
          seen = true;
          turn.comes(first + rows);
          query_gradient(rows, keys.size(), query_rows(part, first), true);
          turn.passes(first + rows);
        }
      }
    finish_keys(group, kv_head, keys, seen, sums);
  }

  // Calls body(group, keys) for a component's tiles of keys.
  template <typename Body>
  void for_each_tile(const TokenComponent& c, const Body& body) const {
    for (int64_t i = c.first_group; i < c.end_group; ++i) {
      const TokenGroup& group = a.groups->keys.data()[i];
      for (int64_t j = 0; j < group.tokens.size(); j += kKeyTile) body(group, piece(group.tokens, j, kKeyTile));
    }
  }

  void scatter_queries(const TokenComponent& c, int64_t kv_head, const Part& part) const {
    a.groups->for_each_queries(c, [&](const TokenGroup& group, const TokenRun& all) {
      const TokenRun queries = clip(c, all, part.rows);
      if (!queries.size()) return;
      const bool correct = group.count && !at_hand(c);
      if (correct) find_mean(group, kv_head);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = kv_head * heads + h;
        const QueryRows rows = query_rows(part, h * part.rows.size() + row_in(c, queries) - part.rows.begin);
        if (correct) correct_rows(c.sample, head, queries, rows);
        scatter_run(a.of(queries).dq, c.sample, head, queries, rows.dq, a.scale);
      }
    });
  }

  // Gradients of a tile of keys, from the sums of the queries' parts.
  void add_parts(const TokenGroup& group, int64_t kv_head, TokenRun keys, const float* sums, int64_t stride) const {
    for (const Tile& tile : {t.dk, t.dv}) {
      for (int64_t i = 0; i < keys.size() * row; i += W) {
        vf total = load(sums + i);
        for (int64_t part = 1; part < a.plan->parts; ++part) total += load(sums + part * stride + i);
        store(tile.data + i, total);
      }
      sums += kKeyTile * row;
    }
    finish_keys(group, kv_head, keys, true, nullptr);
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

  // A token of a component's queries as one of its rows, and back.
  static int64_t row_in(const TokenComponent& c, const TokenRun& at) {
    return at.text ? c.video.size() + at.begin - c.text.begin : at.begin - c.video.begin;
  }
  static TokenRun tokens_of(const TokenComponent& c, bool text, Run rows) {
    const int64_t video = c.video.size();
    if (!text) return {false, c.video.begin + rows.begin, c.video.begin + smaller(rows.end, video)};
    return {true, c.text.begin + larger(rows.begin - video, 0), c.text.begin + rows.end - video};
  }
  static TokenRun clip(const TokenComponent& c, const TokenRun& run, Run rows) {
    const TokenRun most = tokens_of(c, run.text, rows);
    return {run.text, larger(run.begin, most.begin), smaller(run.end, most.end)};
  }

  QueryRows query_rows(const Part& part, int64_t first) const {
    return {{part.dq + first * row, row}, part.dq + rows_of(part) * row + first};
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

// A thread takes a whole chain, or a part of its queries.
template <typename Products>
struct WholeChains {
  const FrameAttention& a;
  const BackwardPlan& plan = *a.plan;
  const int64_t G = a.segment[0].k.size[3];
  std::atomic<int64_t> next{0};

  void run() {
    parallel_for(plan.buffers, a.threads, [](void* p, int64_t i) { static_cast<WholeChains*>(p)->work(i); }, this);
    if (plan.parts == 1) return;
    parallel_for(plan.chains, a.threads, [](void* p, int64_t i) { static_cast<WholeChains*>(p)->add_parts(i); }, this);
  }

 private:
  struct Alone {  // nobody else adds to the queries
    void comes(int64_t) const {}
    void passes(int64_t) const {}
  };

  const TokenComponent& component(int64_t chain) const { return a.groups->components.data()[chain / G]; }
  float* sums(int64_t chain, int64_t part) const {
    return a.workspace + plan.buffers * plan.buffer_floats + (chain * plan.parts + part) * plan.key_floats;
  }
  int64_t tile_floats() const { return 2 * BackwardPlan::kKeyTile * round_up(a.segment[0].q.size[4]); }

  void work(int64_t worker) {
    with_tiles<Products>(a, [&](const Backward<Products>& backward) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < plan.items();) {
        const int64_t chain = i / plan.parts, part = i % plan.parts;
        const TokenComponent& c = component(chain);
        const Run rows = {smaller(part * plan.part_rows, c.queries()),
                          smaller((part + 1) * plan.part_rows, c.queries())};
        const typename Backward<Products>::Part some = {rows, a.workspace + worker * plan.buffer_floats};
        float* to = plan.parts > 1 ? sums(chain, part) : nullptr;
        backward.find_deltas(c, chain % G, rows);
        backward.clear_queries(some, 0, backward.rows_of(some));
        backward.for_each_tile(c, [&](const TokenGroup& group, const TokenRun& keys) {
          backward.key_tile(c, group, chain % G, keys, some, Alone{}, to);
          if (to) to += tile_floats();
        });
        backward.scatter_queries(c, chain % G, some);
      }
    });
  }
  void add_parts(int64_t chain) const {
    with_tiles<Products>(a, [&](const Backward<Products>& backward) {
      const float* from = sums(chain, 0);
      backward.for_each_tile(component(chain), [&](const TokenGroup& group, const TokenRun& keys) {
        backward.add_parts(group, chain % G, keys, from, plan.key_floats);
        from += tile_floats();
      });
    });
  }
};

// Threads take the tiles of a chain one after another. Items are handed out in order, so that whoever a thread waits
// for has begun.
template <typename Products>
struct SharedChains {
  static constexpr int64_t kPieces = 16;  // of a chain's queries, for what is done with rows alone
  static constexpr int64_t kAll = INT64_MAX;

  const FrameAttention& a;
  const BackwardPlan& plan = *a.plan;
  const int64_t G = a.segment[0].k.size[3];

  void run() {
    parallel_for(
        plan.chains * kPieces, a.threads, [](void* p, int64_t i) { static_cast<SharedChains*>(p)->find_deltas(i); },
        this);
    parallel_for(plan.tiles, a.threads, [](void* p, int64_t i) { static_cast<SharedChains*>(p)->tile(i); }, this);
  }

 private:
  using Part = typename Backward<Products>::Part;

  struct Turn {
    const Backward<Products>& backward;
    const Part& part;
    int64_t* mine;
    const int64_t* before;  // null: the first tile, which clears the rows that nobody has added to
    int64_t* cleared;

    void comes(int64_t end) const {
      if (before) return wait_until(before, end);
      backward.clear_queries(part, *cleared, end);
      *cleared = larger(*cleared, end);
    }
    void passes(int64_t end) const { __atomic_store_n(mine, end, __ATOMIC_RELEASE); }
  };

  void find_deltas(int64_t i) const {
    const int64_t chain = i / kPieces, piece = i % kPieces;
    const TokenComponent& c = a.groups->components.data()[chain / G];
    const Run rows = {c.queries() * piece / kPieces, c.queries() * (piece + 1) / kPieces};
    with_tiles<Products>(a, [&](const Backward<Products>& backward) { backward.find_deltas(c, chain % G, rows); });
  }

  void tile(int64_t i) const {
    int64_t low = 0, high = a.groups->components.end() - a.groups->components.begin();
    while (low + 1 < high) {  // the component: the last one that begins at or before it
      const int64_t middle = (low + high) / 2;
      (plan.first_tile.data()[middle] <= i ? low : high) = middle;
    }
    const int64_t first = plan.first_tile.data()[low], count = (plan.first_tile.data()[low + 1] - first) / G;
    const int64_t kv_head = (i - first) / count, number = (i - first) % count, chain = low * G + kv_head;
    const TokenComponent& c = a.groups->components.data()[low];
    if (number == 0 && chain >= plan.buffers) wait_until(a.done + chain - plan.buffers, 1);
    with_tiles<Products>(a, [&](const Backward<Products>& backward) {
      const Part part = {{0, c.queries()}, a.workspace + chain % plan.buffers * plan.buffer_floats};
      int64_t cleared = 0, at = 0;
      const Turn turn = {backward, part, a.progress + i, number ? a.progress + i - 1 : nullptr, &cleared};
      backward.for_each_tile(c, [&](const TokenGroup& group, const TokenRun& keys) {
        if (at++ == number) backward.key_tile(c, group, kv_head, keys, part, turn, nullptr);
      });
      if (number)
        wait_until(a.progress + i - 1, kAll);
      else
        turn.comes(backward.rows_of(part));
      turn.passes(kAll);
      if (number + 1 < count) return;
      backward.scatter_queries(c, kv_head, part);
      __atomic_store_n(a.done + chain, 1, __ATOMIC_RELEASE);
    });
  }
};

template <typename Products>
void run_backward(const FrameAttention& a) {
  const int64_t H = a.segment[0].q.size[3];
  // Queries that see nothing belong to no component.
  for (int64_t i = 0; i < a.groups->queries.end() - a.groups->queries.begin(); ++i) {
    const TokenGroup& group = a.groups->queries.data()[i];
    for (int64_t h = 0; h < H && !group.count; ++h) clear_run(a.of(group.tokens).dq, group.sample, h, group.tokens);
  }
  if (a.plan->together)
    SharedChains<Products>{a}.run();
  else
    WholeChains<Products>{a}.run();
}

}  // namespace vdcore::cpu::VDCORE_ISA
