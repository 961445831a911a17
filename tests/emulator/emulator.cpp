#include "emulator/emulator.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "emulator/fibers.h"
#include "emulator/memory.h"

#if defined(__x86_64__)
asm(R"(
.text
.type vdcore_switch_fiber, @function
vdcore_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vdcore_switch_fiber, . - vdcore_switch_fiber
)");
#endif

namespace vdcore::cuda::emulator {
namespace {

constexpr int kLanes = 32;
constexpr int kPatience = 8;  // passes without progress until a block is stuck

// What a launch may ask for: sm_90's, the largest of any architecture. E7.
constexpr int64_t kMostBlocks = 2147483647;
constexpr int kMostThreads = 1024;
constexpr size_t kMostShared = 227 << 10, kMostParameters = 4096, kMostCluster = 8;

struct Fiber {
  enum State { ready, waiting, polling, done } state = ready;
  Context context;
  uint32_t index = 0;
  bool (*poll)(void*) = nullptr;
  void* poll_argument = nullptr;
  const char* where = "";
};

struct Warp {
  int arrived = 0;
  Complete complete = nullptr;
  Site site;
  void* lanes[kLanes] = {};
};

struct Barrier {
  uint32_t arrived = 0, count = 0;
  std::vector<Fiber*> waiting;
  uint32_t lanes[kMostThreads / kLanes] = {};  // of each warp, those that have arrived
  Site sites[kMostThreads / kLanes];           // and where
  Gathered known;
};

struct Block {
  Barrier barriers[16];
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;
  size_t bytes = 0;  // of shared memory
  std::unique_ptr<Extension> extension;
  uint32_t ended = 0;  // threads

  bool holds(const void* p) const { return p >= shared && p < shared + bytes; }
};

struct Failure {};  // of what runs on its own, found while a thread waits for it

// The blocks that run at the same time: one, or a cluster's.
struct Cluster {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  Touched shared;  // memory of all blocks
  Clocks clocks;
  std::vector<Fiber*> met;  // those that wait for all others
  Gathered known;           // by them
  Context scheduler;
  Fiber* running = nullptr;
  bool polls = false;  // on behalf of a thread that waits: no fiber runs
  const std::function<void()>* kernel = nullptr;
  std::string error;
  Position position{};
};

struct Range {
  const char *begin, *end;
};

thread_local Cluster* cluster = nullptr;
thread_local std::vector<std::unique_ptr<char[]>> stacks;
thread_local std::vector<Range> exposed;
thread_local Order order = Order::forward;
thread_local uint64_t random_state = 1;
thread_local int64_t edges = 0;
thread_local Touched global;  // in this launch

uint32_t random_below(size_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state % n);
}

Block& here() { return cluster->blocks[cluster->position.rank]; }

void give_way(Fiber::State state) {
  Fiber& self = *cluster->running;
  self.state = state;
  switch_to(self.context, cluster->scheduler);
}

// Whether all threads of the cluster that have not ended wait for one another: then they go on.
bool cluster_has_met() {
  size_t there = cluster->met.size();
  for (const Block& block : cluster->blocks) there += block.ended;
  if (there < cluster->fibers.size()) return false;
  const Past past = cluster->known.take();
  for (Fiber* fiber : cluster->met) {
    fiber->state = Fiber::ready;
    cluster->clocks.acquire(fiber->index, past);
  }
  cluster->clocks.meet_cluster(past);
  cluster->met.clear();
  return true;
}

void fiber_entry() {
  (*cluster->kernel)();
  ++here().ended;
  cluster_has_met();
  give_way(Fiber::done);
  __builtin_unreachable();
}

void stand_at(const Fiber& fiber) {
  Position& at = cluster->position;
  at.block += fiber.index / at.threads - at.rank;
  at.rank = fiber.index / at.threads;
  at.thread = fiber.index % at.threads;
}

bool can_run(Fiber& fiber) {
  if (fiber.state == Fiber::polling) {
    stand_at(fiber);
    cluster->polls = true;
    try {
      if (fiber.poll(fiber.poll_argument)) fiber.state = Fiber::ready;
    } catch (const Failure&) {
    }
    cluster->polls = false;
  }
  return fiber.state == Fiber::ready;
}

void resume(Fiber& fiber) {
  cluster->running = &fiber;
  stand_at(fiber);
  switch_to(cluster->scheduler, fiber.context);
}

// Runs every lane of the warp that can run until it waits. False if there is none.
bool run_warp(size_t warp) {
  const size_t first = warp * kLanes, count = std::min<size_t>(kLanes, cluster->fibers.size() - first);
  bool ran = false;
  const size_t turn = order == Order::random ? random_below(count) : 0;
  for (size_t i = 0; i < count; ++i) {
    const size_t lane = order == Order::backward ? count - 1 - i : (i + turn) % count;
    Fiber& fiber = cluster->fibers[first + lane];
    const bool can = can_run(fiber);
    if (!cluster->error.empty()) return true;
    if (!can) continue;
    resume(fiber);
    ran = true;
    if (!cluster->error.empty()) return true;
  }
  return ran;
}

bool run_some_warp() {
  const size_t warps = cluster->warps.size(), turn = order == Order::random ? random_below(warps) : 0;
  for (size_t i = 0; i < warps; ++i)
    if (run_warp(order == Order::backward ? warps - 1 - i : (i + turn) % warps)) return true;
  return false;
}

void begin(Block& block) {
  std::memset(block.shared, 0xff, block.bytes);  // NaN in every format
  for (Barrier& barrier : block.barriers) barrier = Barrier{};
  block.extension.reset();
  block.ended = 0;
}

// From block `first` on.
void run_cluster(uint32_t first) {
  cluster->position.block = first;
  cluster->position.rank = 0;
  const Position& at = cluster->position;
  cluster->clocks.begin(first / at.cluster, at.cluster, at.threads);
  cluster->shared.clear();
  for (Block& block : cluster->blocks) begin(block);
  for (Warp& warp : cluster->warps) warp.arrived = 0;
  cluster->met.clear(), cluster->known = {};
  for (Fiber& fiber : cluster->fibers) {
    fiber.state = Fiber::ready;
    prepare(fiber.context, stacks[fiber.index].get(), fiber_entry);
  }
  // Who waits for a unit that works on its own may have to be asked a few times.
  for (int idle = 0; cluster->error.empty() && idle < kPatience; idle = run_some_warp() ? 0 : idle + 1) {
  }
  if (!cluster->error.empty()) return;
  for (Fiber& fiber : cluster->fibers)
    if (fiber.state != Fiber::done) {
      stand_at(fiber);
      cluster->error = "thread " + std::to_string(cluster->position.thread) + " waits for ever at " + fiber.where;
      return;
    }
  for (Block& block : cluster->blocks)
    if (block.extension && cluster->error.empty()) cluster->error = block.extension->finish();
}

}  // namespace

void set_order(Order o, uint64_t seed) {
  order = o;
  random_state = seed * 0x9e3779b97f4a7c15u + 1;
}

void set_edges(int64_t blocks) { edges = blocks; }

void expose(const void* begin, const void* end) {
  exposed.push_back({static_cast<const char*>(begin), static_cast<const char*>(end)});
}
void expose_nothing() { exposed.clear(); }

void run(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel, size_t parameter_bytes,
         int cluster_blocks) {
  const auto most = [](const char* what, size_t asked, size_t limit) {
    if (asked > limit)
      throw std::runtime_error("a launch of " + std::to_string(asked) + " " + what + ", at most " +
                               std::to_string(limit) + " are possible");
  };
  most("blocks", static_cast<size_t>(blocks), kMostBlocks);
  most("threads a block", static_cast<size_t>(threads), kMostThreads);
  most("bytes of shared memory", shared_bytes, kMostShared);
  most("bytes of parameters", parameter_bytes, kMostParameters);
  most("blocks a cluster", static_cast<size_t>(cluster_blocks), kMostCluster);
  if (blocks % cluster_blocks) throw std::runtime_error("a launch of blocks that are no whole clusters");
  global.clear();
  Cluster running;
  running.fibers.resize(cluster_blocks * threads);
  running.warps.resize((running.fibers.size() + kLanes - 1) / kLanes);
  running.blocks.resize(cluster_blocks);
  for (Block& block : running.blocks) {
    block.memory.reset(new char[shared_bytes + 1024]);
    const auto start = (reinterpret_cast<uintptr_t>(block.memory.get()) + 1023) & ~uintptr_t{1023};
    block.shared = reinterpret_cast<char*>(start);
    block.bytes = shared_bytes;
  }
  running.kernel = &kernel;
  running.position.threads = static_cast<uint32_t>(threads);
  running.position.cluster = static_cast<uint32_t>(cluster_blocks);
  while (stacks.size() < running.fibers.size()) stacks.emplace_back(new char[kStack]);
  for (size_t i = 0; i < running.fibers.size(); ++i) running.fibers[i].index = static_cast<uint32_t>(i);
  Cluster* const outer = cluster;
  cluster = &running;
  const int64_t end = edges / cluster_blocks * cluster_blocks;
  for (int64_t i = 0; i < blocks && running.error.empty(); i += cluster_blocks) {
    if (end > 0 && i == end && i < blocks - end) i = blocks - end;
    run_cluster(static_cast<uint32_t>(i));
  }
  cluster = outer;
  if (!running.error.empty())
    throw std::runtime_error("block " + std::to_string(running.position.block) + ": " + running.error);
}

const Position& position() { return cluster->position; }
char* shared_memory() { return here().shared; }

void* in_block(void* p, uint32_t rank) {
  if (rank >= cluster->blocks.size()) fail("a block of rank " + std::to_string(rank) + ": the cluster has none");
  Block& there = cluster->blocks[rank];
  if (there.ended == cluster->position.threads) fail("shared memory of a block of the cluster that has ended");
  return there.shared + (static_cast<char*>(p) - here().shared);
}

void fail(const std::string& what) {
  cluster->error = "thread " + std::to_string(cluster->position.thread) + ": " + what;
  if (cluster->polls) throw Failure{};
  give_way(Fiber::done);
  __builtin_unreachable();
}

void check_access(const void* p, size_t bytes, size_t alignment) {
  const char* begin = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    fail("an access of " + std::to_string(bytes) + " bytes is not aligned");
  if (here().holds(begin) && here().holds(begin + bytes - 1)) return;
  if (exposed.empty()) return;
  for (const Range& range : exposed)
    if (begin >= range.begin && begin + bytes <= range.end) return;
  fail("an access of " + std::to_string(bytes) + " bytes lies outside of every tensor of the call");
}

void check_shared(const void* p, size_t bytes) {
  if (!here().holds(p)) fail("an address that is not in shared memory");
  check_access(p, bytes);
}

Clocks& clocks() { return cluster->clocks; }
uint32_t agent() { return cluster->position.rank * cluster->position.threads + cluster->position.thread; }
const char* stack_end() { return stacks[cluster->running->index].get() + kStack; }

namespace {

void touch(const void* p, size_t bytes, Touch::Kind kind) {
  const bool shared = here().holds(p);
  if (shared && kind == Touch::reads_constant) fail("a load by ld.global.nc of shared memory");
  (shared ? cluster->shared : global)
      .touch(p, bytes, {kind, clocks().now(agent()), {&clocks(), agent(), 1, nullptr, !shared}, false});
}

}  // namespace

void stored(const void* p, size_t bytes) { touch(p, bytes, Touch::writes); }
void loaded(const void* p, size_t bytes, bool constant) {
  touch(p, bytes, constant ? Touch::reads_constant : Touch::reads);
}
void loaded_by_unit(const void* p, size_t bytes) { global.touch(p, bytes, {Touch::reads_constant, {}, {}, true}); }
void touched_by_unit(const void* p, size_t bytes, bool writes, const Event& by, const Knowing& knowing) {
  cluster->shared.touch(p, bytes, {writes ? Touch::writes : Touch::reads, by, knowing, true});
}

void meet_warp(Complete complete, void* mine, const char* what, const Site& site) {
  Fiber& self = *cluster->running;
  Warp& warp = cluster->warps[self.index / kLanes];
  self.where = what;
  if (warp.arrived && warp.complete != complete)
    fail(std::string("lanes of a warp are at different instructions, one at ") + what);
  if (warp.arrived && !(warp.site == site))
    fail("lanes of a warp are at different places, lines " + std::to_string(warp.site.line) + " and " +
         std::to_string(site.line) + ", both at " + what);
  warp.complete = complete;
  warp.site = site;
  warp.lanes[self.index % kLanes] = mine;
  if (++warp.arrived < kLanes) return give_way(Fiber::waiting);
  warp.arrived = 0;
  complete(warp.lanes);
  const uint32_t first = self.index / kLanes * kLanes;
  for (uint32_t i = first; i < first + kLanes; ++i) cluster->fibers[i].state = Fiber::ready;
}

void sync_warp() {
  const auto sync = [](void* const*) { clocks().meet(cluster->running->index / kLanes * kLanes, kLanes); };
  meet_warp(sync, nullptr, "bar.warp.sync");
}

namespace {

// Counts the thread; true for the last one, which frees those that wait and tells all what each has known.
bool arrives(int id, uint32_t count, bool waits, const Site& site) {
  if (id < 0 || id > 15) fail("barrier " + std::to_string(id) + ": there are 0 to 15");
  if (!count || count % kLanes) fail("a barrier of " + std::to_string(count) + " threads: warps are whole");
  Barrier& barrier = here().barriers[id];
  if (barrier.arrived && barrier.count != count) fail("threads expect different numbers at one barrier");
  barrier.count = count;
  const uint32_t warp = cluster->position.thread / kLanes, lane = 1u << cluster->position.thread % kLanes;
  if (barrier.lanes[warp] & lane) fail("a warp arrives twice at a barrier in one phase");
  if (barrier.lanes[warp] && !(barrier.sites[warp] == site))
    fail("lanes of a warp arrive at a barrier from different places, lines " +
         std::to_string(barrier.sites[warp].line) + " and " + std::to_string(site.line));
  barrier.lanes[warp] |= lane;
  barrier.sites[warp] = site;
  clocks().release(agent(), barrier.known);
  if (++barrier.arrived < count) return false;
  for (const uint32_t lanes : barrier.lanes)
    if (lanes && ~lanes) fail("a barrier that only some lanes of a warp reach");
  const Past past = barrier.known.take();
  for (Fiber* fiber : barrier.waiting) {
    fiber->state = Fiber::ready;
    clocks().acquire(fiber->index, past);
  }
  if (waits) clocks().acquire(agent(), past);
  barrier = Barrier{};
  return true;
}

}  // namespace

void meet_block(int id, uint32_t count, const Site& site) {
  Fiber& self = *cluster->running;
  self.where = "a barrier";
  if (arrives(id, count, true, site)) return;
  here().barriers[id].waiting.push_back(&self);
  give_way(Fiber::waiting);
}

void meet_cluster() {
  Fiber& self = *cluster->running;
  self.where = "a barrier of the cluster";
  cluster->met.push_back(&self);
  clocks().release(agent(), cluster->known);
  if (!cluster_has_met()) give_way(Fiber::waiting);
}

void arrive_block(int id, uint32_t count, const Site& site) { arrives(id, count, false, site); }

bool lands_at_once() { return order == Order::forward || (order == Order::random && random_below(2)); }

std::unique_ptr<Extension>& extension() { return here().extension; }
std::unique_ptr<Extension>& extension_of(uint32_t rank) { return cluster->blocks[rank].extension; }

void wait_until(bool (*ready)(void*), void* argument, const char* what) {
  Fiber& self = *cluster->running;
  if (ready(argument)) return;
  self.where = what;
  self.poll = ready;
  self.poll_argument = argument;
  give_way(Fiber::polling);
}

}  // namespace vdcore::cuda::emulator
