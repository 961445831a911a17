#include "cpu/frame_attention/backward_plan.h"

#include <algorithm>

namespace vdcore::cpu {
namespace {

constexpr int64_t kFewTiles = 4;              // of keys: a chain of so few is no way to share it
constexpr int64_t kFewChains = 64;            // below it, chains of few tiles are cut along their queries
constexpr int64_t kItems = 128;               // into so many items in all
constexpr int64_t kPartRows = 192;            // a part has so many rows, or a multiple of them
constexpr int64_t kPartialFloats = 16 << 20;  // at most so many for the keys' sums
constexpr double kBusy = 0.9;                 // a share of the threads' time

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t n) { return ceiling(n, 16) * 16; }  // to the longest vector

}  // namespace

BackwardPlan::BackwardPlan(const TokenGroups& groups, int64_t heads, int64_t kv_heads, int64_t channels, int threads) {
  const auto components = static_cast<int64_t>(groups.components.size());
  chains = components * kv_heads;
  first_tile.push_back(0);
  for (const TokenComponent& c : groups.components) {
    int64_t count = 0;
    for (int64_t i = c.first_group; i < c.end_group; ++i) count += ceiling(groups.keys[i].tokens.size(), kKeyTile);
    most_tiles = std::max(most_tiles, count);
    first_tile.push_back(first_tile.back() + count * kv_heads);
  }
  tiles = first_tile.back();
  const int64_t row = padded(channels), per_kv = heads / kv_heads, most_rows = groups.largest_component();
  part_rows = most_rows;
  if (most_tiles <= kFewTiles && chains > 0 && chains < kFewChains) {
    key_floats = most_tiles * kKeyTile * 2 * row;
    const int64_t wanted =
        std::min(ceiling(kItems, chains), kPartialFloats / std::max<int64_t>(chains * key_floats, 1));
    part_rows = std::max<int64_t>(ceiling(ceiling(most_rows, std::max<int64_t>(wanted, 1)), kPartRows), 1) * kPartRows;
    parts = std::max<int64_t>(ceiling(most_rows, part_rows), 1);
    if (parts == 1) part_rows = most_rows;
  }
  const int64_t turns = ceiling(chains, std::max(threads, 1));
  together = parts == 1 && tiles > chains && static_cast<double>(chains) < kBusy * static_cast<double>(turns * threads);
  // A chain is under way while a thread is at one of its tiles: with as many tiles as threads, its first and the last
  // of the one before.
  buffers = together ? std::min(chains, 2 + ceiling(threads * chains, tiles))
                     : std::min<int64_t>(std::max(threads, 1), chains * parts);
  buffer_floats = padded(per_kv * part_rows * (row + 1));
}

}  // namespace vdcore::cpu
