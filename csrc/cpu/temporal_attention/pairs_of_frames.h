// Frames of temporal attention as operands of products of bfloat16 in pairs: rows and terms come in steps of
// kLeastTerms.
//
// Rows are staged as they are, half the bytes of float32. Scores are K Q^T, so that the softmax runs down the lanes;
// weights become pairs of keys, are transposed into rows of queries, and results are P V, with values interleaved in
// pairs: nothing of D channels is transposed but Q.
#pragma once

#include "cpu/core/pairs.h"
#include "cpu/temporal_attention/tiles.h"

namespace vdcore::cpu::VDCORE_ISA {

constexpr int64_t kStageHalves = 224 * 1024;  // rows of one step: bytes as in forward.cpp

// Rows of scores in which keys are computed.
constexpr int64_t kLeastRows = kLeastTerms < kTileRows ? kLeastTerms : kTileRows;
VDCORE_INLINE int64_t whole_keys(int64_t n) { return (n + kLeastRows - 1) / kLeastRows * kLeastRows; }

// Whether a call's products can be in pairs. A few queries of many keys fill a quarter of a tile, for which all keys
// and values are packed: 4 of 32 frames took 1.05 of the time of float32, 8 of 32 0.97, and 8, 16, 32 and 64 of as many
// 0.90, 0.81, 0.80 and 0.79 (forward, one thread, AVX512-BF16, 40, 72, 64 and 64 channels). A factor of 0 would make
// NaN of what is hidden.
inline bool in_pairs(const TemporalAttention& a) {
  const bool in_bf16 = a.q.dtype == DType::bf16 && a.k.dtype == DType::bf16 && a.v.dtype == DType::bf16;
  const bool few = a.q.size[1] < W / 2 && a.k.size[1] > W;
  return in_bf16 && !few && !a.bias && a.scale != 0;
}

// Rows of several heads over a block of frames: (head, frame, term). Padding is 0.
struct PairStage {
  uint16_t* data = nullptr;
  int64_t frames = 0, terms = 0;

  PairStage() = default;
  PairStage(int64_t heads, int64_t frames, int64_t terms, Arena& arena)
      : data(halves(arena, heads * frames * terms)), frames(frames), terms(terms) {
    if (data) memset(data, 0, heads * frames * terms * sizeof(uint16_t));
  }
  Rows head(int64_t h) const { return {data + h * frames * terms, terms}; }
};

// Stage rows [offset, offset + frames.size()) = rows of x in `frames`.
inline void gather(const TensorView& x, const Place& place, Run frames, HeadRange heads, const PairStage& stage,
                   int64_t offset) {
  with_dtype(x.dtype, [&](auto type) {
    const int64_t head_bytes = x.stride[3] * size_of(x.dtype);
    for (int64_t i = 0; i < frames.size(); ++i) {
      const char* in = x.at(place.b, frames.begin + i, place.s, heads.first);
      for (int64_t h = 0; h < heads.count; ++h, in += head_bytes)
        copy_row<decltype(type)::value>(in, x.size[4], stage.head(h).at(offset + i, 0).data);
    }
  });
}

// Asks for a part of the next step's rows.
inline void fetch(int64_t lines, Prefetch& prefetch) {
  if (prefetch.source)
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(prefetch.take(1));
}

// What a column of queries sees, in whole steps: one run or two.
struct ColumnSteps {
  Run runs[2];
  int64_t count = 0;

  explicit ColumnSteps(const ColumnMask& mask) {
    for (const Run& run : mask.segments) {
      if (!run.size()) continue;
      const Run whole = {run.begin / kLeastTerms * kLeastTerms, least_terms(run.end)};
      if (count && whole.begin <= runs[count - 1].end)
        runs[count - 1].end = whole.end;
      else
        runs[count++] = whole;
    }
  }

  // Calls key(j, masked) as ColumnMask::for_each_key, and gap(j) for what the steps hold beside these, in order.
  template <typename Key, typename Gap>
  VDCORE_INLINE void for_each_key(const ColumnMask& mask, const Key& key, const Gap& gap) const {
    int64_t r = 0, at = count ? runs[0].begin : 0;
    const auto fill = [&](int64_t end) {
      for (; at < end; ++at) gap(at);
    };
    mask.for_each_key([&](int64_t j, bool masked) __attribute__((always_inline)) {
      while (j >= runs[r].end) {
        fill(runs[r].end);
        at = runs[++r].begin;
      }
      fill(j);
      at = j + 1;
      key(j, masked);
    });
    if (count) fill(runs[r].end);
  }
};

// Weights of W queries from column i on, pairs of keys in lanes, as rows of queries.
inline void transpose_weights(const ColumnSteps& steps, int64_t i, Pairs words, Rows weights) {
  for (int64_t r = 0; r < steps.count; ++r)
    for (int64_t j = steps.runs[r].begin / kTileTerms * kTileTerms; j < steps.runs[r].end; j += kTileTerms)
      transpose_words(words.at(j, i).data, words.row, weights.at(i, j).data, weights.row);
}

// Values of a step's heads, which come into products in pairs. Rows with infinity or NaN, where somebody may not see
// them, go round the products, where 0 times them would reach everybody.
class PairValues {
 public:
  PairValues(const TensorView& x, int64_t kv_heads, int64_t keys, int64_t row, Arena& arena)
      : x_(x), keys_(keys), row_(row), stage_(kv_heads, whole_terms(keys), whole_terms(row), arena) {
    packed_ = {halves(arena, whole_terms(keys) * row), 2 * row};
    strange_ = reinterpret_cast<int32_t*>(arena.floats(kv_heads * keys));
    strange_counts_ = reinterpret_cast<int32_t*>(arena.floats(kv_heads));
    value_ = arena.floats(row);
  }

  void load(const Place& place, Run frames, HeadRange kv) const { gather(x_, place, frames, kv, stage_, frames.begin); }

  // Takes a head's strange rows out, so that no row that a step before this one has left holds any.
  void take_out_strange(const VisibleKeys& visible, const SeenKeys& seen, int64_t kv_head) const {
    const Rows values = stage_.head(kv_head);
    int32_t count = 0;
    vi found = {};
    for (const Run& run : seen.runs)
      for (int64_t j = run.begin; j < run.end && !visible.dense; ++j)
        found |= strange_lanes(values.at(j, 0).data, row_);
    const bool any = any_lane(found);
    for (const Run& run : seen.runs)
      for (int64_t j = run.begin; j < run.end && any; ++j) {
        if (!any_lane(strange_lanes(values.at(j, 0).data, row_))) continue;
        strange_[kv_head * keys_ + count++] = static_cast<int32_t>(j);
        memset(values.at(j, 0).data, 0, values.row * sizeof(uint16_t));
      }
    strange_counts_[kv_head] = count;
  }

  // A head's, as a right operand.
  void pack(int64_t kv_head) const { pack_pairs(least_terms(keys_), row_, stage_.head(kv_head), packed_); }
  Pairs at(int64_t key) const { return packed_.at(key, 0); }
  Rows head(int64_t kv_head) const { return stage_.head(kv_head); }

  // Adds what was taken out to the results of those that see it.
  void add_strange(const VisibleKeys& visible, const Place& place, HeadRange kv, int64_t kv_head, int64_t queries,
                   Rows weights, Tile out) const {
    for (int64_t s = 0; s < strange_counts_[kv_head]; ++s) {
      const int64_t j = strange_[kv_head * keys_ + s], channels = x_.size[4];
      with_dtype(x_.dtype, [&](auto type) {
        read_row<decltype(type)::value>(x_.at(place.b, j, place.s, kv.first + kv_head), channels, value_);
      });
      for (int64_t i = 0; i < queries; ++i) {
        const bool sees =
            (visible.begin[i] <= j && j < visible.end[i]) || (visible.low_begin[i] <= j && j < visible.low_end[i]);
        if (!sees) continue;
        const float weight = from_bf16(*weights.at(i, j).data);
        for (int64_t c = 0; c < channels; ++c) *out.at(i, c).data += weight * value_[c];
      }
    }
  }

 private:
  const TensorView& x_;
  int64_t keys_, row_;
  PairStage stage_;
  Pairs packed_;                        // (whole_terms(keys), row)
  int32_t *strange_, *strange_counts_;  // (kv heads, keys), (kv heads,)
  float* value_;                        // (row,)
};

}  // namespace vdcore::cpu::VDCORE_ISA
