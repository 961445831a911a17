// Tangents of temporal attention, by the formula of frame attention's (frame_attention/tangents_of_tiles.h): what a
// step has of its queries. Products in float32 (tangents.cpp) and in pairs of bfloat16 (tangents_amx.cpp) share it.
#pragma once

#include "cpu/temporal_attention/steps.h"
#include "cpu/temporal_attention/tangents.h"

namespace vdcore::cpu::VDCORE_ISA {

struct TemporalTangentsPlan : TemporalPlan {
  const TemporalTangents& given;
  bool moves;  // the scores have a tangent

  // As TemporalPlan's.
  TemporalTangentsPlan(const TemporalTangents& args, int64_t queries, int64_t keys, int64_t room)
      : TemporalPlan(args.forward, {&args.forward.q, &args.forward.k, &args.forward.v, &args.dq, &args.dk, &args.dv},
                     args.dout, queries, keys, room),
        given(args),
        moves(args.dq || args.dk || args.dbias) {}
};

// Of a column of a tile (keys, queries): the mean over the keys that each query sees, 0 where there are none.
inline vf mean_seen(const ColumnMask& mask, Tile column) {
  vf total = {}, count = {};
  mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
    const vf e = load(column.at(j, 0).data);
    total += masked ? select(mask.sees(j), e, vf{}) : e;
    count += masked ? select(mask.sees(j), splat(1.f), vf{}) : splat(1.f);
  });
  return total / max(count, splat(1.f));
}

// Of the queries of a step.
struct TemporalTangentResults {
  Stage out;          // dout
  float *lse, *dlse;  // (heads, query_block): lse in base 2

  TemporalTangentResults(const TemporalTangentsPlan& p, Arena& arena) {
    out = {arena.floats(p.rows() * p.shape.row), p.query_block, p.shape.row};
    lse = arena.floats(p.rows());
    dlse = arena.floats(p.rows());
  }

  // And no dlse yet.
  void load_lse(const TemporalTangentsPlan& p, const Place& place, Run queries) const {
    for (float* x : {lse, dlse}) memset(x, 0, p.rows() * sizeof(float));
    for (int64_t i = 0; i < queries.size(); ++i) {
      const char* at = p.a.lse.at(place.b, queries.begin + i, place.s, place.heads.first);
      for (int64_t h = 0; h < place.heads.count; ++h, at += p.a.lse.stride[3] * sizeof(float)) {
        const float found = *reinterpret_cast<const float*>(at);
        if (found != -kInf) lse[h * p.query_block + i] = found * kLog2E;  // else 0: exp2(-inf - 0) is 0, not NaN
      }
    }
  }

  void write(const TemporalTangentsPlan& p, const Place& place, Run queries) const {
    with_dtype(p.given.dout.dtype, [&](auto type) { write_rows<decltype(type)::value>(p, place, queries); });
  }

 private:
  template <DType T>
  void write_rows(const TemporalTangentsPlan& p, const Place& place, Run queries) const {
    const TensorView &rows = p.given.dout, &sums = p.given.dlse;
    for (int64_t i = 0; i < queries.size(); ++i) {
      char* row = rows.at(place.b, queries.begin + i, place.s, place.heads.first);
      char* sum = sums.at(place.b, queries.begin + i, place.s, place.heads.first);
      for (int64_t h = 0; h < place.heads.count; ++h) {
        const float* from = out.head(h).at(i, 0).data;
        if (p.stream)
          stream_row<T>(row, p.shape.D, from, 1);
        else
          write_row<T>(row, p.shape.D, from, 1);
        *reinterpret_cast<float*>(sum) = dlse[h * p.query_block + i];
        row += rows.stride[3] * size_of(T);
        sum += sums.stride[3] * sizeof(float);
      }
    }
  }
};

}  // namespace vdcore::cpu::VDCORE_ISA
