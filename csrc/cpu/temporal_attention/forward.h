// Temporal attention, forward: how results leave a step. Products in float32 (forward.cpp) and in pairs of bfloat16
// (forward_amx.cpp) share it.
#pragma once

#include "cpu/temporal_attention/steps.h"

namespace vdcore::cpu::VDCORE_ISA {

inline TemporalPlan forward_plan(const TemporalAttention& a, int64_t room) {
  return {a, {&a.q, &a.k, &a.v}, a.out, 1, 2, room};
}

// Of the queries of a step.
struct TemporalResults {
  Stage out;             // sums of exp2(score - maximum) * v
  float *maximum, *sum;  // (heads, query_block), scores in base 2

  TemporalResults(const TemporalPlan& p, Arena& arena) {
    out = {arena.floats(p.rows() * p.shape.row), p.query_block, p.shape.row};
    maximum = arena.floats(p.rows());
    sum = arena.floats(p.rows());
  }
};

template <DType T>
void write_rows(const TemporalPlan& p, const TemporalResults& t, const Place& place, Run queries) {
  const auto [b, s, heads] = place;
  const TensorView& out = p.a.out;
  const int64_t head_bytes = out.stride[3] * size_of(T);
  for (int64_t i = queries.begin; i < queries.end; ++i) {
    char* row = out.at(b, i, s, heads.first);
    for (int64_t h = 0; h < heads.count; ++h, row += head_bytes) {
      const float* in = t.out.head(h).at(i - queries.begin, 0).data;
      const float sum = t.sum[h * p.query_block + i - queries.begin];
      const float factor = sum == 0 ? 0 : 1 / sum;
      if (p.stream)
        stream_row<T>(row, p.shape.D, in, factor);
      else
        write_row<T>(row, p.shape.D, in, factor);
    }
  }
}

inline void write_lse(const TemporalPlan& p, const TemporalResults& t, const Place& place, Run queries) {
  const auto [b, s, heads] = place;
  for (int64_t h = 0; h < heads.count; ++h)
    for (int64_t i = 0; i < queries.size(); i += W) {
      const int64_t at = h * p.query_block + i;
      float lanes[W];
      store(lanes, log_sum_exp({load(t.maximum + at), load(t.sum + at)}));
      for (int64_t lane = 0; lane < smaller(W, queries.size() - i); ++lane)
        *reinterpret_cast<float*>(p.a.lse.at(b, queries.begin + i + lane, s, heads.first + h)) = lanes[lane];
    }
}

inline void write_results(const TemporalPlan& p, const TemporalResults& t, const Place& place, Run queries) {
  with_dtype(p.a.out.dtype, [&](auto type) { write_rows<decltype(type)::value>(p, t, place, queries); });
  if (p.a.lse) write_lse(p, t, place, queries);
}

}  // namespace vdcore::cpu::VDCORE_ISA
