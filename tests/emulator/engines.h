// What an sm_90a multiprocessor keeps of a running block beside its threads: shared by the files that implement
// emulator_sm90.h.
#pragma once

#include <unordered_map>
#include <vector>

#include "emulator/emulator.h"
#include "emulator/emulator_sm90.h"

namespace vdcore::cuda::emulator {

constexpr int kLanes = 32, kWarpsOfGroup = 4, kMostWarps = 32;

// ---- mbarriers and boxes ----

// What is not in the 64 bits of an mbarrier.
struct Initialised {
  Event by, fence;  // fence.mbarrier_init of the same thread, once it was there
  uint32_t unit;    // the agent that writes the boxes which complete here
  Event written;    // the last one of them
  Gathered known;   // by who has arrived in this phase
  Past past;        // what the phases that have completed know
};

struct Box {
  char* shared;
  char* memory;   // of the block that it is in
  uint32_t rank;  // of that block
  const TensorMap* map;
  uint64_t* barrier;
  int32_t at[5];
  Past past;  // of the thread that has asked for it
};

// ---- wgmma ----

// The result of products of one warp that add to one another, while they are in flight.
struct Sum {
  float* d[kLanes];
  std::vector<float> rows;  // [16][n]
  bool at_once;
};

// Registers of one warp that are operands of wgmma: where they are, and what they held.
struct Registers {
  const void* of[kLanes];
  size_t words;
  std::vector<uint32_t> held;  // [32][words]

  std::vector<uint32_t> now() const;
  bool changed() const { return held != now(); }
};

struct Product {
  Operands operands;
  const uint32_t* a[kLanes];
  Registers values;  // of a
  std::shared_ptr<Sum> sum;
  int group;
  Event read;  // its reads of shared memory
  bool done;
};

// All variables of a lane as a wgmma.fence has seen them: its stack.
struct Variables {
  const char *begin = nullptr, *end = nullptr;
  std::vector<char> held;
};

struct Products {  // of a warp: a warp does 16 rows of its warpgroup's product by itself
  bool fenced = false;
  int open = 0;  // number of the group that the next product joins
  std::vector<Product> list;
  Variables fence[kLanes];  // the last one
  uint32_t unit = 0;        // the agent that reads its operands, 0: not yet
};

// What a warp told wgmma between two commits, without its own registers.
struct Told {
  uint64_t a, b;
  int n, flags;
  Site site;
  bool operator==(const Told& x) const {
    return a == x.a && b == x.b && n == x.n && flags == x.flags && site == x.site;
  }
};
struct Warpgroup {
  std::vector<std::vector<Told>> groups;  // by the first warp that committed each
  std::vector<int> warps;                 // that have committed it
  int committed[kWarpsOfGroup] = {};
  std::vector<Told> open[kWarpsOfGroup];
};

// Registers of a thread from a setmaxnreg on.
struct Limit {
  int registers;
  Site site;
  Event by;
};

struct Engines : Extension {
  std::unordered_map<const uint64_t*, Initialised> mbarriers;
  std::vector<Box> boxes;
  Products warps[kMostWarps];
  Warpgroup warpgroups[kMostWarps / kWarpsOfGroup];
  int free_registers = 0;
  std::vector<Limit> limits[kMostWarps];  // by warp
  std::string finish() override;
};

inline Engines& engines_in(std::unique_ptr<Extension>& block) {
  if (!block) block.reset(new Engines);
  return static_cast<Engines&>(*block);
}
inline Engines& engines() { return engines_in(extension()); }

inline int own_index() { return static_cast<int>(position().thread / kLanes); }

// ---- Tiles in shared memory ----

// `span`: bytes of the swizzle, 128 or 64.
inline uint32_t swizzled(uint32_t address, uint32_t span) { return address ^ (address >> 7 & (span / 16 - 1)) << 4; }

}  // namespace vdcore::cuda::emulator
