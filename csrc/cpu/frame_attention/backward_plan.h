// How frame attention's backward is shared out among threads. A chain is one component (see token_groups.h) for one
// key/value head; its tiles of keys come one after another, because each adds to the gradients of the same queries.
//
// - Where there are chains enough for the threads, a thread takes a whole one.
// - Where there are not, threads take the tiles of a chain in order, and each of them follows the one before: a tile
//   adds to rows of queries when the tile before has. The sums come in the order of a single thread, and so do the
//   bits.
// - A few chains of a few tiles, as a prompt's, are cut along their queries: every part has a sum of its own for the
//   keys, and these are added up in order. That depends on sizes alone, and so do the bits.
#pragma once

#include <cstdint>
#include <vector>

#include "common/token_groups.h"

namespace vdcore::cpu {

struct BackwardPlan {
  static constexpr int64_t kKeyTile = 128;

  BackwardPlan(const TokenGroups& groups, int64_t heads, int64_t kv_heads, int64_t channels, int threads);

  int64_t chains = 0;
  int64_t tiles = 0;       // of keys, of all chains
  int64_t most_tiles = 0;  // of one chain
  bool together = false;   // threads share a chain
  int64_t parts = 1;       // of a chain's queries
  int64_t part_rows = 0;   // of a component's queries in one part
  int64_t buffers = 0;     // of gradients of queries: one for each thread, or for each chain under way
  int64_t buffer_floats = 0;
  int64_t key_floats = 0;           // sums for the keys of one chain, if there are parts
  std::vector<int64_t> first_tile;  // of each component, times its heads, and the end

  VDCORE_INLINE int64_t floats() const {
    return buffers * buffer_floats + (parts > 1 ? chains * parts * key_floats : 0);
  }
  // What threads can take.
  VDCORE_INLINE int64_t items() const { return together ? tiles : chains * parts; }
};

}  // namespace vdcore::cpu
