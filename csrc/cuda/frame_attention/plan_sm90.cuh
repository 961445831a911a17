// Sizes, parameters and shared memory of forward_sm90.cuh.
#pragma once

#include "common/query_tiles.h"
#include "cuda/core/ptx_sm90.h"
#include "cuda/core/softmax.cuh"

namespace vdcore::cuda {

// The compile-time plan of a kernel: channels D (a multiple of 16), warpgroups of 64 query rows, keys per tile, stages.
//
// Queries and keys lie in columns of 64 channels, zeros past the last one. The channels of values are the N of their
// product, which columns must divide: no public kernel has it otherwise. So 65 to 96 channels are 96, three columns of
// 32 with a swizzle of 64 bytes, as in FlashAttention-3.
template <int kD, int kGroups, int kKeyRows, int kStageCount, bool kTurns = true>
struct FramePlan {
  static constexpr int D = kD, kConsumers = kGroups, kKeys = kKeyRows, kStages = kStageCount;
  static constexpr bool kPingPong = kTurns;  // warpgroups take turns at the tensor cores
  static constexpr int kRows = 64 * kConsumers, kThreads = 128 * (kConsumers + 1);
  static constexpr int kColumns = (D + 63) / 64;  // of 64 channels, 128 bytes
  static constexpr int kResult = D <= 64 ? 64 : D <= 96 ? 96 : 128;
  static constexpr int kValueColumn = kResult % 64 ? 32 : 64, kValueColumns = kResult / kValueColumn;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  static constexpr uint32_t kQueryBytes = kRows * kColumns * 128, kKeyBytes = kKeys * kColumns * 128;
  static constexpr uint32_t kValueBytes = kKeys * kResult * 2;
  static constexpr int kBarriers = 2 + 4 * kStages;
  static constexpr size_t kShared =
      1024 + kQueryBytes + kStages * (kKeyBytes + kValueBytes) + 2 * 40 + 8 * kBarriers + 4 * kStages;
  static_assert(D % 16 == 0 && kKeys % 16 == 0 && kKeys <= 256 && kRows <= 256);
  static_assert(kShared <= 232448, "of 227 KB");
};

struct FrameSource {
  TensorMap q, k, v;
  int32_t q_frame, k_frame;  // tokens per frame where frames have gaps between them, 0: none
};

struct FrameParameters {
  FrameSource video, text;
  QueryTiles tiles;
  const int64_t *lengths, *text_lengths;  // (B), or null
  char* out;
  float* lse;
  Gate gate;                          // out = gate * result + (1 - gate) * out
  char* ungated;                      // the result itself, or null
  int64_t rows, video_row, text_row;  // of a sample in out, and where the video and the text begin
  int32_t items, blocks;              // tiles of all heads and samples, and how many blocks share them
  int32_t heads, ratio;               // query heads, and how many of them share a key head
  int32_t channels;
  float exponent;  // scale times log2 e
};

// A stage of a ring and how often it has come round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  VDCORE_DEVICE void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// What the producer tells the consumers of an item: a tile of queries of a head.
struct FrameItem {
  int64_t first;  // of its rows in out, counted in rows of one head
  int32_t rows, live, key_tiles;
  int32_t sample, head, start;
};

template <class Plan>
struct FrameShared {
  char* queries;     // [columns][rows][64]
  char* keys;        // [stages][columns][keys][64]
  char* values;      // [stages][value columns][keys][64 or 32]
  FrameItem* items;  // [2]: the next one is written while the last one's result is stored
  uint64_t *q_full, *q_empty;
  uint64_t *k_full, *k_empty, *v_full, *v_empty;  // [stages]
  int32_t* key_rows;                              // [stages]

  VDCORE_DEVICE explicit FrameShared(char* base) {
    base += -shared_address(base) & 1023;  // what a swizzle of 128 bytes repeats after
    queries = base;
    keys = queries + Plan::kQueryBytes;
    values = keys + Plan::kStages * Plan::kKeyBytes;
    items = reinterpret_cast<FrameItem*>(values + Plan::kStages * Plan::kValueBytes);
    q_full = reinterpret_cast<uint64_t*>(items + 2);
    q_empty = q_full + 1;
    k_full = q_empty + 1;
    k_empty = k_full + Plan::kStages;
    v_full = k_empty + Plan::kStages;
    v_empty = v_full + Plan::kStages;
    key_rows = reinterpret_cast<int32_t*>(v_empty + Plan::kStages);
  }
};

}  // namespace vdcore::cuda
