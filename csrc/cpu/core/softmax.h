// Softmax down the lanes: scores are kept transposed, (keys, queries), so that W queries sit in the lanes of a vector
// and maximum, sum and exponential over keys are plain vector arithmetic.
#pragma once

#include "cpu/core/tile.h"

namespace vdcore::cpu::VDCORE_ISA {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Keys that a block of queries sees, one entry per query: [low_begin, low_end) and, after them, [begin, end).
struct VisibleKeys {
  const int32_t *begin, *end, *low_begin, *low_end;
  bool dense;  // every query sees every key
};

// The union of runs.
struct Hull {
  Run run = {INT64_MAX, 0};
  VDCORE_INLINE void add(Run other) {
    if (other.size()) run = {smaller(run.begin, other.begin), larger(run.end, other.end)};
  }
};

// Two runs that hold what both hulls do: disjoint, sorted. Every low run ends before its own query's window, but may
// lie in or behind the windows of others.
VDCORE_INLINE void separate(Hull low, Hull window, Run (&runs)[2]) {
  if (!window.run.size()) window.run = {low.run.end, low.run.end};
  if (low.run.end > window.run.begin) window.run.end = larger(window.run.end, low.run.end);
  runs[0] = {low.run.begin, smaller(low.run.end, window.run.begin)};
  if (!runs[0].size()) runs[0] = {window.run.begin, window.run.begin};
  runs[1] = window.run;
}

// What W queries, one vector column of a score tile, see of the keys [first_key, first_key + keys) of a block.
// Indices below are relative to the block.
struct ColumnMask {
  vi begin, end, low_begin, low_end;
  Run segments[2];  // keys that at least one lane sees: disjoint, sorted
  Run clear[2];     // of each, the keys that all lanes see: one run

  ColumnMask(const VisibleKeys& visible, int64_t query, int64_t queries, int64_t first_key, int64_t keys) {
    if (visible.dense) {
      begin = low_begin = low_end = vi{};
      end = splat(static_cast<int32_t>(keys));
      segments[0] = clear[0] = {0, 0};
      segments[1] = clear[1] = {0, keys};
      return;
    }
    int32_t lanes[4][W];
    Hull low, window;
    Run in_low = {0, keys}, in_window = {0, keys};
    const Run block = {first_key, first_key + keys};
    for (int64_t lane = 0; lane < W; ++lane) {
      const int64_t i = smaller(query + lane, queries - 1);  // padding lanes do as the last query does
      const auto relative = [&](const int32_t* begins, const int32_t* ends, int at) {
        const Run run = intersect({begins[i], ends[i]}, block);
        lanes[at][lane] = static_cast<int32_t>(run.begin - first_key);
        lanes[at + 1][lane] = static_cast<int32_t>(run.end - first_key);
        return Run{run.begin - first_key, run.end - first_key};
      };
      const Run low_run = relative(visible.low_begin, visible.low_end, 0);
      const Run run = relative(visible.begin, visible.end, 2);
      low.add(low_run), window.add(run);
      in_low = intersect(in_low, low_run), in_window = intersect(in_window, run);
    }
    memcpy(&low_begin, lanes[0], sizeof low_begin);
    memcpy(&low_end, lanes[1], sizeof low_end);
    memcpy(&begin, lanes[2], sizeof begin);
    memcpy(&end, lanes[3], sizeof end);
    separate(low, window, segments);
    const Run all[2] = {intersect(in_low, segments[0]), in_window};
    for (int s = 0; s < 2; ++s) clear[s] = all[s].size() ? all[s] : Run{segments[s].end, segments[s].end};
  }

  VDCORE_INLINE vi sees(int64_t key) const {
    const int32_t j = static_cast<int32_t>(key);
    return ((begin <= j) & (end > j)) | ((low_begin <= j) & (low_end > j));
  }

  // Calls body(key, masked): masked where not every lane sees the key.
  template <typename Body>
  VDCORE_INLINE void for_each_key(const Body& body) const {
    for (int s = 0; s < 2; ++s) {
      for (int64_t j = segments[s].begin; j < clear[s].begin; ++j) body(j, true);
      for (int64_t j = clear[s].begin; j < clear[s].end; ++j) body(j, false);
      for (int64_t j = clear[s].end; j < segments[s].end; ++j) body(j, true);
    }
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

// dlse = sum of P E over sum of P, of W rows whose keys are all at hand, 0 where they see none: the sum is taken of E
// less a guess, its mean, and over the sum of P, which comes from an lse that was rounded, or from scores of q and k
// that were not: P is to be divided by it. So neither brings in an error, and a row with one key gets its E exactly. (A
// mean over all keys errs by half of what one key's E as the guess does, 33 keys.)
struct TangentOfSum {
  vf guess;
  KeySum weights = {}, weighted = {};

  VDCORE_INLINE void add(int64_t key, vf p, vf e) {
    weights.add(key, p);
    weighted.add(key, p * (e - guess));
  }
  struct Found {
    vf dlse, inverse;  // of the sum of P
  };
  VDCORE_INLINE Found find() {
    weights.flush();
    weighted.flush();
    const vi none = weights.total == 0.f;
    const vf inverse = select(none, vf{}, 1.f / weights.total);
    return {select(none, vf{}, guess) + weighted.total * inverse, inverse};
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

// Natural logarithm of the sum of exponentials; -inf for a row that has seen nothing, NaN for one that has seen NaN.
VDCORE_INLINE vf log_sum_exp(const SoftmaxState& state) {
  const vf lse = (state.maximum + log2(state.sum)) * kLn2;
  return select(state.sum == 0.f, splat(-kInf), select(state.sum == state.sum, lse, state.sum));
}

}  // namespace vdcore::cpu::VDCORE_ISA
