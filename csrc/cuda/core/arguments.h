// What the attention kernels are told. Plain values: a launch copies them.
#pragma once

#include "common/frame_runs.h"
#include "cuda/core/divider.h"

namespace vdcore::cuda {

// (B, T, S, heads, D): where it starts and its strides in bytes. Rows start at multiples of 16 bytes, D is dense.
struct Tokens {
  char* data;
  int64_t b, t, s, h;

  // Unsigned: a product with a 64-bit stride takes two instructions instead of four.
  VDCORE_INLINE char* row(uint32_t i_b, uint32_t i_t, uint32_t i_s, uint32_t i_h) const {
    return data + (offset(i_b, b) + offset(i_t, t) + offset(i_s, s) + offset(i_h, h));
  }
  static VDCORE_INLINE int64_t offset(uint32_t i, int64_t stride) {
    return static_cast<int64_t>(uint64_t{i} * static_cast<uint64_t>(stride));
  }
};

enum class NormKind : int32_t { none = 0, rms = 1, layer = 2 };
enum class RopeStyle : int32_t { none = 0, interleaved = 1, half = 2 };

// Weights and biases are float32 (D), or null for 1 and 0.
struct HeadNorm {
  const float *weight, *bias;
};

// Tables are float32 with unit stride over their `pairs` channels; strides in elements, 0 where they are broadcast.
struct NormRope {
  NormKind kind = NormKind::none;
  float eps = 0;
  HeadNorm q{}, k{};
  RopeStyle style = RopeStyle::none;
  int32_t pairs = 0;
  const float *cos = nullptr, *sin = nullptr;
  int64_t table_t = 0, table_s = 0, table_h = 0;

  VDCORE_INLINE bool any() const { return kind != NormKind::none || style != RopeStyle::none; }
};

// Broadcast to (B, T, S, H, D): strides in elements, 0 where it does not vary.
struct Gate {
  const char* data;  // null: no gate
  bool wide;         // float32, else the element of the call
  int64_t b, t, s, h, d;

  VDCORE_INLINE int64_t index(int64_t i_b, int64_t i_t, int64_t i_s, int64_t i_h) const {
    return i_b * b + i_t * t + i_s * s + i_h * h;
  }
};

// Which frames see which: see common/frame_runs.h.
struct Frames {
  WindowMask mask;
  int64_t start;           // index of the first query frame among the keys
  const int64_t* lengths;  // (B) on the device, or null
  int32_t queries, keys;
  bool masked;    // some pair may be hidden
  Divider chunk;  // by mask.chunk

  Frames() = default;
  Frames(const WindowMask& mask, int64_t start, const int64_t* lengths, int32_t queries, int32_t keys, bool masked)
      : mask(mask), start(start), lengths(lengths), queries(queries), keys(keys), masked(masked) {
    // A chunk of all frames, and nothing in it overflows.
    this->mask.chunk = smaller(mask.chunk, int64_t{1} << 31);
    chunk = Divider(this->mask.chunk);
  }
};

}  // namespace vdcore::cuda
