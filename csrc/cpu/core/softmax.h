// Softmax down the lanes: scores are kept transposed, (keys, queries), so that W queries sit in the lanes of a vector
// and maximum, sum and exponential over keys are plain vector arithmetic.
#pragma once

#include "cpu/core/tile.h"

namespace vdcore::cpu::VDCORE_ISA {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Keys that a block of queries sees, one entry per query: [0, sink) and [begin, end).
struct VisibleKeys {
  const int32_t *begin, *end, *sink;
  bool dense;  // every query sees every key
};

// What W queries, one vector column of a score tile, see of the keys [first_key, first_key + keys) of a block.
// Indices below are relative to the block.
struct ColumnMask {
  vi begin, end, sink;
  Run segments[2];  // keys that at least one lane sees: disjoint, sorted
  Run clear;        // keys that all lanes see, one run in segments[1]

  ColumnMask(const VisibleKeys& visible, int64_t query, int64_t queries, int64_t first_key, int64_t keys) {
    if (visible.dense) {
      begin = sink = vi{};
      end = splat(static_cast<int32_t>(keys));
      segments[0] = {0, 0};
      segments[1] = clear = {0, keys};
      return;
    }
    int32_t lane_begin[W], lane_end[W], lane_sink[W];
    Run some = {keys, 0}, every = {0, keys};
    int64_t sinks = 0;
    for (int64_t lane = 0; lane < W; ++lane) {
      const int64_t i = smaller(query + lane, queries - 1);  // padding lanes do as the last query does
      const Run run = intersect({visible.begin[i] - first_key, visible.end[i] - first_key}, {0, keys});
      const int64_t sunk = larger(0, smaller(visible.sink[i] - first_key, keys));
      lane_begin[lane] = static_cast<int32_t>(run.begin);
      lane_end[lane] = static_cast<int32_t>(run.end);
      lane_sink[lane] = static_cast<int32_t>(sunk);
      if (run.size()) some = {smaller(some.begin, run.begin), larger(some.end, run.end)};
      every = intersect(every, run);
      sinks = larger(sinks, sunk);
    }
    memcpy(&begin, lane_begin, sizeof begin);
    memcpy(&end, lane_end, sizeof end);
    memcpy(&sink, lane_sink, sizeof sink);
    if (some.size() == 0) some = {sinks, sinks};
    segments[0] = {0, smaller(sinks, some.begin)};
    segments[1] = some;
    clear = every.size() ? every : Run{some.end, some.end};
  }

  VDCORE_INLINE vi sees(int64_t key) const {
    const int32_t j = static_cast<int32_t>(key);
    return ((begin <= j) & (end > j)) | (sink > j);
  }

  // Calls body(key, masked): masked where not every lane sees the key.
  template <typename Body>
  VDCORE_INLINE void for_each_key(const Body& body) const {
    for (int64_t j = segments[0].begin; j < segments[0].end; ++j) body(j, true);
    for (int64_t j = segments[1].begin; j < clear.begin; ++j) body(j, true);
    for (int64_t j = clear.begin; j < clear.end; ++j) body(j, false);
    for (int64_t j = clear.end; j < segments[1].end; ++j) body(j, true);
  }
};

// Scores of one block: S[keys, queries] = K Q^T where somebody sees the key, the rest of S stays undefined.
template <typename P>
void score_products(const VisibleKeys& visible, int64_t queries, int64_t first_key, int64_t keys, int64_t channels,
                    Tile k, Tile q_transposed, Tile scores, P& prefetch) {
  const Scalars left = {k.data, k.row, 1};
  if (visible.dense) return score_product(keys, round_up(queries), channels, left, q_transposed, scores, prefetch);
  for (int64_t i = 0; i < queries; i += W) {
    const ColumnMask mask(visible, i, queries, first_key, keys);
    for (const Run& run : mask.segments)
      if (run.size())
        score_product(run.size(), W, channels, left.at(run.begin, 0), q_transposed.at(0, i), scores.at(run.begin, i),
                      prefetch);
  }
}

// Sum over keys in groups: a long chain of additions errs by more than its terms do, and all of a row by as much.
struct KeySum {
  vf total = {}, group = {};

  VDCORE_INLINE void add(int64_t key, vf x) {
    group += x;
    if (key % 32 == 31) flush();
  }
  VDCORE_INLINE void flush() {
    total += group;
    group = vf{};
  }
};

// From P and dP to dS = P (dP - delta), for W rows whose keys are all at hand: delta = sum of P dP over sum of P, less
// dlse. P comes from an lse that was rounded, by one factor for a whole row: over its sum, it is free of that. A key
// that has all the weight of its row, as the only one has, gets P = 1 and dS = P dlse exactly: other gradients are 0
// there.
struct RowGradients {
  vf whole, inverse, delta, minus_dlse;

  VDCORE_INLINE RowGradients(KeySum sum, KeySum weighted, vf minus_dlse) : minus_dlse(minus_dlse) {
    sum.flush();
    weighted.flush();
    whole = select(sum.total == 0.f, splat(-1.f), sum.total);  // a row that sees nothing: no weight equals this
    inverse = splat(1.f) / whole;
    delta = minus_dlse + weighted.total / whole;
  }
  // One key: P and dP in, P and dS out.
  VDCORE_INLINE void apply(vf& p, vf& gradient) const {
    const auto alone = p == whole;
    const vf rest = select(alone, (gradient - gradient) - minus_dlse, gradient - delta);  // NaN and infinity stay NaN
    p = select(alone, splat(1.f), p * inverse);
    gradient = p * rest;
  }
};

// Running state of the online softmax for W queries: in base 2, scores already multiplied by log2(e).
struct SoftmaxState {
  vf maximum = splat(-kInf), sum = {};
};

// Turns a column of scores into exp2(score - maximum), in place, and brings the state up to date. Returns the factor by
// which results accumulated so far are to be multiplied. Hidden keys get exactly 0.
VDCORE_INLINE vf softmax_column(Tile column, const ColumnMask& mask, SoftmaxState& state) {
  vf top = state.maximum;
  mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
    float* at = column.at(j, 0).data;
    vf s = load(at);
    if (masked) {
      s = select(mask.sees(j), s, splat(-kInf));
      store(at, s);
    }
    top = max(top, s);
  });
  // A row that has seen nothing keeps -inf; 0 in its place makes exp2(-inf - 0) an exact 0 instead of NaN.
  const vf base = select(top == -kInf, vf{}, top);
  const vf factor = exp2(state.maximum - base);
  KeySum sum;
  mask.for_each_key([&](int64_t j, bool) __attribute__((always_inline)) {
    float* at = column.at(j, 0).data;
    const vf p = exp2(load(at) - base);
    sum.add(j, p);
    store(at, p);
  });
  sum.flush();
  state.sum = state.sum * factor + sum.total;
  state.maximum = top;
  return factor;
}

// Natural logarithm of the sum of exponentials; -inf for a row that has seen nothing.
VDCORE_INLINE vf log_sum_exp(const SoftmaxState& state) {
  const vf lse = (state.maximum + log2(state.sum)) * kLn2;
  return select(state.sum == 0.f, splat(-kInf), lse);
}

}  // namespace vdcore::cpu::VDCORE_ISA
