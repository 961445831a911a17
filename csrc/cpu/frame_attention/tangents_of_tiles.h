// Tangents of frame attention. With P the probabilities and E = scale (dq k^T + q dk^T) the scores' tangent,
// dlse = sum(P E) along a row and dout = (P E) v + P dv - dlse out. P comes from forward's lse, so that one pass over
// the keys is enough and nothing is rescaled: three products a tile with the tangent of q alone, five with all three.
//
// E may have a mean much larger than its deviations, which cancels in dout only up to rounding, and out was rounded: so
// every row's E is taken less its mean over the first tile of keys, which dlse gets back at the end. Where the first
// tile of keys is the last, as of a prompt, dlse is known before the second product, which then takes P (E - dlse): out
// is not read.
//
// `Products` is how a tile of queries meets one of keys: in vectors, or in AMX's tiles.
#pragma once

#include "cpu/frame_attention/job.h"
#include "cpu/frame_attention/tangents.h"

namespace vdcore::cpu::VDCORE_ISA {

struct KeysOfTile {
  bool first, all;  // the first that the queries see; all of them
  bool moves;       // the scores have a tangent
};

// What a tile of queries comes to.
struct TangentResults {
  Tile out;                   // (queries, row): sums of P (E - shift) v + P dv
  Tile stage;                 // (queries of a panel, row)
  float *lse, *shift;         // lse in base 2
  float *sum, *sum_of_terms;  // of P (E - shift), exactly and as products round its terms

  TangentResults(int64_t queries, int64_t panel, int64_t row, Arena& arena) {
    out = {arena.floats(queries * row), row};
    stage = {arena.floats(panel * row), row};
    for (float** x : {&lse, &shift, &sum, &sum_of_terms}) *x = arena.floats(queries);
  }
};

// A Products has kQueryTile, kPanel (queries at once) and
//   Products(D, arena); results(): TangentResults
//   tile_of(keys): how many of so many keys it takes at once
//   load_queries(segment, sample, head, tokens, scale)
//   attend(segment, sample, kv_head, keys, queries, which): what is known of these keys
//   finish(queries): results() is complete
template <typename TileProducts>
class Tangents {
 public:
  using Arguments = FrameTangents;
  using Products = TileProducts;

  Tangents(const FrameTangents& args, Products& products, const TokenGroup& group, int64_t head, TokenRun queries)
      : a(args),
        products(products),
        t(products.results()),
        group(group),
        segment(args.of(queries)),
        queries(queries),
        head(head),
        kv_head(head / (segment.q.size[3] / segment.k.size[3])),
        row(round_up(segment.q.size[4])),
        moves(segment.dq || segment.dk) {}

  void run() {
    load_rows();
    products.load_queries(segment, group.sample, head, queries, a.scale);
    bool first = true;
    const bool all = group.count == 1 && group.runs[0].size() <= Products::tile_of(group.runs[0].size());
    for (int i = 0; i < group.count; ++i) {
      const int64_t keys = group.runs[i].size(), step = Products::tile_of(keys);
      for (int64_t j = 0; j < keys; j += step) {
        const TokenRun some = piece(group.runs[i], j, step);
        products.attend(a.of(some), group.sample, kv_head, some, queries.size(), {first, all, moves});
        first = false;
      }
    }
    if (first || !(moves || segment.dv))
      memset(t.out.data, 0, queries.size() * row * sizeof(float));
    else
      products.finish(queries.size());
    finish(moves && !first && !all);
  }

 private:
  const FrameTangents& a;
  Products& products;
  const TangentResults& t;
  const TokenGroup& group;
  const TangentSegment& segment;
  const TokenRun queries;
  const int64_t head, kv_head, row;
  const bool moves;  // the scores have a tangent

  void load_rows() const {
    for (int64_t i = 0; i < Products::kQueryTile; i += W)
      for (float* x : {t.lse, t.shift, t.sum, t.sum_of_terms}) store(x + i, vf{});
    for_each_row(segment.lse, group.sample, head, queries, [&](const char* at, int64_t i) {
      const float lse = *reinterpret_cast<const float*>(at);
      t.lse[i] = lse == -kInf ? 0 : lse * kLog2E;  // all scores -inf: exp2(-inf - 0) is 0, not NaN
    });
  }

  void finish(bool less_out) const {
    for (int64_t i = 0; less_out && i < queries.size(); i += Products::kPanel) {
      const TokenRun rows = piece(queries, i, Products::kPanel);
      gather_run(segment.out, group.sample, head, rows, t.stage);
      for (int64_t r = 0; r < rows.size(); ++r) {
        float* at = t.out.at(i + r, 0).data;
        const vf sum = splat(t.sum_of_terms[i + r]);
        for (int64_t c = 0; c < row; c += W) store(at + c, load(at + c) - sum * load(t.stage.at(r, c).data));
      }
    }
    scatter_run(segment.dout, group.sample, head, queries, t.out, 1);
    const bool blind = group.count == 0;
    for_each_row(segment.dlse, group.sample, head, queries,
                 [&](char* at, int64_t i) { *reinterpret_cast<float*>(at) = blind ? 0 : t.sum[i] + t.shift[i]; });
  }
};

}  // namespace vdcore::cpu::VDCORE_ISA
