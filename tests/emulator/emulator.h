// Runs CUDA kernels on the CPU, for tests: blocks one after another, every thread of a block a fiber of its own.
//
// What it is strict about: shared memory is poisoned with NaN when a block starts; global memory may be touched only
// inside the tensors of the call; a collective that not all lanes reach, or that lanes reach differently, is an error;
// what reaches for a block of the cluster that has ended is one, too; warps, and lanes between two collectives, run in
// an order that the test chooses, each as far as it can, so that a missing barrier shows.
//
// Rules that hardware has and right numbers do not show, each an error:
//   E1  a tensor map's base is memory of the call
//   E2  registers of a wgmma in flight are not written
//   E3  registers written since the last wgmma.fence are no operands, those of the first product included; what is in
//       flight is added to by products of its own shape alone
//   E4  the four warps of a warpgroup, and all lanes of each, issue the same products at one place, by
//       descriptors that begin where the pattern of their swizzle does
//   E5  setmaxnreg: whole warpgroups, each at one place and behind a barrier since its last one, sizes, and registers
//       that somebody has given back
//   E6  barriers: whole warps, all lanes at one place and once a phase, ids 0 to 15, multiples of 32 threads
//   E7  a launch: 1,024 threads, 227 KB of shared memory, 4 KB of parameters, 2^31 - 1 blocks
//   E8  what threads write to shared memory reaches wgmma and TMA only behind their fence.proxy.async, and an mbarrier
//       TMA and other blocks only behind the fence.mbarrier_init of who has initialised it, once; bytes that it is told
//       of land, and somebody waits for them
//   E9  no two blocks, nor two unordered threads, write one address; ld.global.nc and TMA load nothing that the kernel
//       writes, before or later
//   E10 a read and a write of one address are ordered. Blocks are not, but by a barrier of their cluster and, in shared
//       memory alone, by mbarriers, which arrive in the scope of a block; threads of a block are by barriers that both
//       have joined and by mbarriers where they arrive, lanes of a warp by bar.warp.sync, too: shuffles, votes and
//       products order no memory, nor does a box what its thread did before it
//
// fibers.h: threads. clocks.h: what happens before what. memory.h: who has touched what. emulator.cpp: launches, warps,
// barriers. emulator_sm90.h: the units of sm_90a.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>

#include "emulator/clocks.h"

namespace vdcore::cuda::emulator {

// `forward`, `backward`: of the warps that can run, the first or the last does, and so do its lanes. `random`: any.
enum class Order { forward, backward, random };
void set_order(Order order, uint64_t seed);

// Runs the kernel's blocks, those of a cluster at the same time. Throws std::runtime_error for what a kernel must not
// do.
void run(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel,
         size_t parameter_bytes = 0, int cluster = 1);

// Of grids larger than twice this, runs only so many blocks at either end: how blocks are numbered shows there. 0: all.
void set_edges(int64_t blocks);

// Memory [begin, end) that the next kernels may touch; without any, all of it.
void expose(const void* begin, const void* end);
void expose_nothing();

// ---- For the instructions of tests/emulator/ptx_emulated.h: called by a thread of a kernel ----

struct Position {
  uint32_t thread, block, threads;
  uint32_t rank, cluster;  // of the block among how many of its cluster
};
const Position& position();

char* shared_memory();

// What is at p here, in another block of the cluster; fails where that block has ended.
void* in_block(void* p, uint32_t rank);

// Fails where [p, p + bytes) is neither in shared memory nor in what is exposed, or is not aligned: to its size.
void check_access(const void* p, size_t bytes, size_t alignment);
inline void check_access(const void* p, size_t bytes) { check_access(p, bytes, bytes); }
// The same, of shared memory alone.
void check_shared(const void* p, size_t bytes);

// A store, and a load that does (ld.global.nc) or does not assume that the kernel writes none of it, after
// check_access.
void stored(const void* p, size_t bytes);
void loaded(const void* p, size_t bytes, bool constant);

// What runs on its own loads global memory; reads or writes shared memory of a block of the cluster.
void loaded_by_unit(const void* p, size_t bytes);
void touched_by_unit(const void* p, size_t bytes, bool writes, const Event& by, const Knowing& knowing);

// Of the running cluster; and the number there of the thread.
Clocks& clocks();
uint32_t agent();

// Where the stack of the thread ends: its variables lie before that.
const char* stack_end();

// Where in a kernel's source an instruction stands.
struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& x) const { return line == x.line && (file == x.file || std::strcmp(file, x.file) == 0); }
};

// All 32 lanes of the warp meet here; the last one calls complete(arguments of lane 0 to 31). With a site, at one
// place.
using Complete = void (*)(void* const* lanes);
void meet_warp(Complete complete, void* mine, const char* what, const Site& site = {});

// bar.warp.sync.
void sync_warp();

// `count` threads of the block meet at barrier `id`.
void meet_block(int id, uint32_t count, const Site& site);

// Gives way to other threads until ready(argument) holds.
void wait_until(bool (*ready)(void*), void* argument, const char* what);

// All threads of the cluster meet, but those that have ended.
void meet_cluster();

// Counts the thread at barrier `id` without waiting there.
void arrive_block(int id, uint32_t count, const Site& site);

// Whether work that runs on its own is to be done at once, or only when it is waited for: as the order says.
bool lands_at_once();

// What other units of a multiprocessor keep of a running block; made by whoever asks first.
struct Extension {
  virtual ~Extension() = default;
  virtual std::string finish() = 0;  // after the last thread: what is wrong, or nothing
};
std::unique_ptr<Extension>& extension();
std::unique_ptr<Extension>& extension_of(uint32_t rank);

// Ends the kernel with an error.
[[noreturn]] void fail(const std::string& what);

}  // namespace vdcore::cuda::emulator
