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
template <int kD, int kGroups, int kKeyRows, int kStageCount, int kBlocks = (kD > 96 ? 2 : 1), bool kTurns = true>
struct FramePlan {
  static constexpr int D = kD, kConsumers = kGroups, kKeys = kKeyRows, kStages = kStageCount;
  static constexpr int kCluster = kBlocks;   // most blocks that load keys and values together
  static constexpr bool kPingPong = kTurns;  // warpgroups take turns at the tensor cores
  static constexpr int kRows = 64 * kConsumers, kThreads = 128 * (kConsumers + 1);
  static constexpr int kColumns = (D + 63) / 64;  // of 64 channels, 128 bytes
  static constexpr int kResult = D <= 64 ? 64 : D <= 96 ? 96 : 128;
  static constexpr int kValueColumn = kResult % 64 ? 32 : 64, kValueColumns = kResult / kValueColumn;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr uint32_t kQueryBytes = kRows * kColumns * 128, kKeyBytes = kKeys * kColumns * 128;
  static constexpr uint32_t kValueBytes = kKeys * kResult * 2;
  static constexpr int kBarriers = 2 + 4 * kStages;
  static constexpr size_t kShared =
      1024 + kQueryBytes + kStages * (kKeyBytes + kValueBytes) + 2 * 40 + 8 * kBarriers + 4 * kStages;
  static constexpr int kBoxRows = kKeys / kCluster;  // of keys or values, at once
  static_assert(D % 16 == 0 && kBoxRows % 8 == 0 && kKeys % 16 == 0 && kKeys <= 256 && kRows <= 256);
  static_assert(kShared <= 232448, "of 227 KB");
};

struct FrameSource {
  TensorMap q, k, v;
  int32_t q_frame, k_frame;  // tokens per frame where frames have gaps between them, 0: none
  VDCORE_DEVICE void prefetch() const { prefetch_map(&q), prefetch_map(&k), prefetch_map(&v); }
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
  int32_t items, blocks;  // tiles of all heads and samples (of a cluster: pairs), and how many blocks share them
  int32_t cluster;        // of so many blocks
  int32_t heads, ratio;   // query heads, and how many of them share a key head
  int32_t channels;
  float exponent;  // scale times log2 e
};

// Blocks that load keys and values together: each a half of every tile, for both. A block by itself loads both halves.
// Predicted: L2 is short of what tiles of 128 channels want, and 3 to 6 % are won; narrower ones want less, and their
// plans have no clusters.
struct Cluster {
  uint32_t size, rank;
};

// A ring of tiles in shared memory: the producer claims a stage, says how many bytes it loads there and goes on; each
// warp of the consumers, of the other block too, waits for them and releases the stage.
template <int kStages>
struct Pipeline {
  uint64_t *full, *empty;  // [kStages]
  int stage = 0;
  uint32_t parity = 0;

  VDCORE_DEVICE void init(uint32_t readers) const {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, readers);
    }
  }
  VDCORE_DEVICE void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }

  VDCORE_DEVICE void claim() const { mbarrier_wait(empty + stage, parity ^ 1); }
  VDCORE_DEVICE void expect(uint32_t bytes) const { mbarrier_arrive_expect(full + stage, bytes); }

  VDCORE_DEVICE void await() const { mbarrier_wait(full + stage, parity); }
  // Lane i of a warp tells the block that is i away, for all lanes: their reads of what is released come before.
  VDCORE_DEVICE void release(const Cluster& cluster, uint32_t lane) {
    sync_warp();
    if (lane < cluster.size) mbarrier_arrive_at(empty + stage, cluster.rank ^ lane);
    next();
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
  Pipeline<1> of_queries;
  Pipeline<Plan::kStages> of_keys, of_values;
  int32_t* key_rows;  // [stages]

  VDCORE_DEVICE explicit FrameShared(char* base) {
    base += -shared_address(base) & 1023;  // what a swizzle of 128 bytes repeats after
    queries = base;
    keys = queries + Plan::kQueryBytes;
    values = keys + Plan::kStages * Plan::kKeyBytes;
    items = reinterpret_cast<FrameItem*>(values + Plan::kStages * Plan::kValueBytes);
    auto* barrier = reinterpret_cast<uint64_t*>(items + 2);
    const auto take = [&](int n) { return barrier += n, barrier - n; };
    of_queries.full = take(1), of_queries.empty = take(1);
    of_keys.full = take(Plan::kStages), of_keys.empty = take(Plan::kStages);
    of_values.full = take(Plan::kStages), of_values.empty = take(Plan::kStages);
    key_rows = reinterpret_cast<int32_t*>(barrier);
  }
};

}  // namespace vdcore::cuda
