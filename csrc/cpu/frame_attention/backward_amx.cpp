// Frame attention, backward, of bfloat16 in AMX's tiles; other dtypes as without them. dout may be float32, as gated
// attention has it, and is rounded.
//
// P and dS are made of scores in vectors, as without tiles, with queries in the lanes. Then they are rounded and lie in
// rows, which are the left operands of dV = P^T dO and dK = dS^T Q; dQ = dS K needs dS transposed: pairs of keys,
// transposed as words. Sums of a tile stay in float32, and so does what they are added to.
#include "cpu/frame_attention/amx_rows.h"
#include "cpu/frame_attention/backward.h"

namespace vdcore::cpu::VDCORE_REST {
void frame_attention_backward(const FrameAttention&);
}

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class MatrixProducts {
 public:
  static constexpr int64_t kQueryTile = BackwardTiles::kQueryTile, kKeyTile = BackwardTiles::kKeyTile;
  static_assert(kQueryTile % kTileTerms == 0 && kKeyTile % kTileTerms == 0, "both are sums' terms");

  MatrixProducts(int64_t channels, Arena& arena)
      : row(round_up(channels)),
        terms(whole_terms(channels)),
        depth(least_terms(channels)),
        t(round_up(channels), arena) {
    stage = {halves(arena, kKeyTile * terms), terms};
    for (Rows* rows : {&k, &v}) *rows = {halves(arena, kKeyTile * terms), terms};
    for (Pairs* pairs : {&q_channels, &dout_channels}) *pairs = {halves(arena, terms * kQueryTile), 2 * kQueryTile};
    for (Pairs* pairs : {&q_tokens, &dout_tokens}) *pairs = {halves(arena, kQueryTile * row), 2 * row};
    k_tokens = {halves(arena, kKeyTile * row), 2 * row};
    for (Rows* rows : {&p, &ds}) *rows = {halves(arena, kKeyTile * kQueryTile), kQueryTile};
    ds_transposed = {halves(arena, kQueryTile * kKeyTile), kKeyTile};
    part = {arena.floats(kQueryTile * row), row};
  }

  const BackwardTiles& tiles() const { return t; }

  void load_keys(const TensorView& from_k, const TensorView& from_v, int64_t b, int64_t kv_head, TokenRun keys) const {
    const int64_t rows = whole_terms(keys.size());
    gather_rows(from_k, b, kv_head, keys, rows, k);
    gather_rows(from_v, b, kv_head, keys, rows, v);
    pack_pairs(rows, row, k, k_tokens);
  }
  void load_queries(const TensorView& q, const TensorView& dout, int64_t b, int64_t head, TokenRun queries,
                    float scale) {
    factor = scale * kLog2E;
    load_queries(q, b, head, queries, q_channels, q_tokens);
    load_queries(dout, b, head, queries, dout_channels, dout_tokens);
  }

  static VDCORE_INLINE int64_t lanes(int64_t queries) { return whole_terms(queries); }
  VDCORE_INLINE float score_factor() const { return factor; }
  void scores(int64_t queries, int64_t keys) const {
    product(whole_rows(keys), lanes(queries), depth, k, q_channels, t.p, false);
    product(whole_rows(keys), lanes(queries), depth, v, dout_channels, t.ds, false);
  }

  // Rounds P and dS, and adds up the latter as they are then: what their rows do not come to is corrected by that.
  void weighed(int64_t queries, int64_t keys) const {
    for (int64_t i = 0; i < lanes(queries); i += W) {
      const vi live = iota() < splat(static_cast<int32_t>(queries - i));  // the others may be infinity times 0
      vf total = {};
      for (int64_t j = 0; j < whole_terms(keys); j += kTileTerms) {
        uint16_t pairs[kTileTerms * kTileRows] __attribute__((aligned(64)));
        for (int64_t at = 0; at < kTileTerms; at += 2) {
          vf gradient[2] = {};
          for (int64_t r = 0; r < 2; ++r) {
            const int64_t key = j + at + r;
            if (key >= keys) continue;
            gradient[r] = select(live, load(t.ds.at(key, i).data), vf{});
            total += as_bf16(gradient[r]);
            store_half(p.at(key, i).data, select(live, load(t.p.at(key, i).data), vf{}));
            store_half(ds.at(key, i).data, gradient[r]);
          }
          store_words(pairs + at * kTileRows, pair(gradient[0], gradient[1]));
        }
        transpose_words(pairs, kTileTerms, ds_transposed.at(i, j).data, ds_transposed.row);
      }
      store(t.tile_sum + i, total);
    }
  }

  void key_gradients(int64_t queries, int64_t keys, bool first) const {
    product(whole_rows(keys), row, lanes(queries), p, dout_tokens, t.dv, !first);
    product(whole_rows(keys), row, lanes(queries), ds, q_tokens, t.dk, !first);
  }
  // By way of a part of its own: rows beside those of dq are somebody else's.
  void query_gradient(int64_t queries, int64_t keys, Tile dq, bool accumulate) const {
    product(whole_rows(queries), row, whole_terms(keys), ds_transposed, k_tokens, part, false);
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t c = 0; c < row; c += W) {
        float* at = dq.at(i, c).data;
        const vf x = load(part.at(i, c).data);
        store(at, accumulate ? load(at) + x : x);
      }
  }

 private:
  const int64_t row, terms, depth;
  const BackwardTiles t;
  TileScope registers;
  Rows stage, k, v;                 // (kKeyTile, terms)
  Pairs q_channels, dout_channels;  // (terms, kQueryTile)
  Pairs q_tokens, dout_tokens;      // (kQueryTile, row)
  Pairs k_tokens;                   // (kKeyTile, row)
  Rows p, ds;                       // (kKeyTile, kQueryTile)
  Rows ds_transposed;               // (kQueryTile, kKeyTile)
  Tile part;                        // (kQueryTile, row)
  float factor = 0;

  static VDCORE_INLINE void store_half(uint16_t* at, vf x) {
    *reinterpret_cast<vu16_unaligned*>(at) = narrow(rounded(x) >> 16);
  }

  void load_queries(const TensorView& x, int64_t b, int64_t head, TokenRun queries, Pairs channels,
                    Pairs tokens) const {
    const int64_t rows = lanes(queries.size());
    gather_rows(x, b, head, queries, rows, stage);
    pack_transposed(rows, terms, stage, channels);
    pack_pairs(rows, row, stage, tokens);
  }
};

}  // namespace

void frame_attention_backward(const FrameAttention& a) {
  if (!in_bf16(a)) return VDCORE_REST::frame_attention_backward(a);
  run_backward<MatrixProducts>(a);
}

}  // namespace vdcore::cpu::VDCORE_ISA
