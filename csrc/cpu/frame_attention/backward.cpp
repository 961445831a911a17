// Frame attention, backward, in vectors.
#include "cpu/frame_attention/backward.h"

namespace vdcore::cpu::VDCORE_ISA {
namespace {

class VectorProducts {
 public:
  static constexpr int64_t kQueryTile = BackwardTiles::kQueryTile;

  VectorProducts(int64_t channels, Arena& arena) : D(channels), row(round_up(channels)), t(round_up(channels), arena) {
    for (Tile* tile : {&q_transposed, &dout_transposed}) *tile = {arena.floats(row * kQueryTile), kQueryTile};
  }

  const BackwardTiles& tiles() const { return t; }

  void load_keys(const TensorView& k, const TensorView& v, int64_t b, int64_t kv_head, TokenRun keys) const {
    gather_run(k, b, kv_head, keys, t.k);
    gather_run(v, b, kv_head, keys, t.v);
  }
  void load_queries(const TensorView& q, const TensorView& dout, int64_t b, int64_t head, TokenRun queries,
                    float scale) const {
    gather_run(q, b, head, queries, t.q);
    gather_run(dout, b, head, queries, t.dout);
    transpose(queries.size(), D, t.q, scale * kLog2E, q_transposed);
    transpose(queries.size(), D, t.dout, 1.f, dout_transposed);
  }

  static VDCORE_INLINE int64_t lanes(int64_t queries) { return round_up(queries); }
  static VDCORE_INLINE float score_factor() { return 1; }
  void scores(int64_t queries, int64_t keys) const {
    NoPrefetch none;
    score_product(keys, lanes(queries), D, {t.k.data, row, 1}, q_transposed, t.p, none);
    score_product(keys, lanes(queries), D, {t.v.data, row, 1}, dout_transposed, t.ds, none);
  }
  void weighed(int64_t, int64_t) const {}

  void key_gradients(int64_t queries, int64_t keys, bool first) const {
    NoPrefetch none;
    product(keys, row, queries, {t.p.data, kQueryTile, 1}, t.dout, t.dv, !first, none);
    product(keys, row, queries, {t.ds.data, kQueryTile, 1}, t.q, t.dk, !first, none);
  }
  void query_gradient(int64_t queries, int64_t keys, Tile dq, bool accumulate) const {
    NoPrefetch none;
    product(queries, row, keys, {t.ds.data, 1, kQueryTile}, t.k, dq, accumulate, none);
  }

 private:
  const int64_t D, row;
  const BackwardTiles t;
  Tile q_transposed, dout_transposed;  // (row, kQueryTile)
};

}  // namespace

void frame_attention_backward(const FrameAttention& a) { run_backward<VectorProducts>(a); }

}  // namespace vdcore::cpu::VDCORE_ISA
