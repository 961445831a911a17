#include "emulator/emulator_sm90.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "emulator/engines.h"

namespace vdcore::cuda::emulator {

namespace {

// ---- mbarrier: phase, arrivals that are pending and expected, bytes, in the 64 bits themselves ----

struct Barrier {
  uint32_t phase, pending, expected;
  int32_t bytes;
};
constexpr uint32_t kCounts = (1u << 19) - 1;
constexpr int32_t kBytes = (1 << 20) - 1;  // at most, either way

Barrier unpacked(uint64_t x) {
  return {static_cast<uint32_t>(x & 1), static_cast<uint32_t>(x >> 1) & kCounts,
          static_cast<uint32_t>(x >> 20) & kCounts, static_cast<int32_t>(x >> 39) - (1 << 22)};
}

bool anybody_knows(const Event& e) {
  for (uint32_t i = 0; clocks().is_thread(i); ++i)
    if (clocks().knows(i, e)) return true;
  return false;
}

}  // namespace

std::string Engines::finish() {
  bool awaited = boxes.empty();
  for (const auto& [barrier, m] : mbarriers) awaited = awaited && (!m.written.time || anybody_knows(m.written));
  if (!awaited) return "the block ends, and nobody has waited for a box";
  for (const auto& [barrier, m] : mbarriers)
    if (unpacked(*barrier).bytes) return "the block ends, and an mbarrier was told of other bytes than have landed";
  for (const Products& warp : warps)
    if (!warp.list.empty()) return "the block ends before its wgmma have been waited for";
  for (const Warpgroup& group : warpgroups)
    for (const int warps_of : group.warps)
      if (warps_of != kWarpsOfGroup) return "wgmma by some warps of a warpgroup only";
  for (int i = 0; i < kMostWarps; ++i) {
    const std::vector<Limit>& first = limits[i / kWarpsOfGroup * kWarpsOfGroup];
    if (limits[i].size() != first.size()) return "setmaxnreg by some warps of a warpgroup only";
    for (size_t j = 0; j < first.size(); ++j) {
      if (limits[i][j].registers != first[j].registers)
        return "setmaxnreg of different numbers of registers by the warps of a warpgroup";
      if (!(limits[i][j].site == first[j].site)) return "setmaxnreg at different places by the warps of a warpgroup";
    }
  }
  return "";
}

namespace {

Barrier read(const uint64_t* barrier) {
  if (*barrier == ~uint64_t{0}) fail("an mbarrier is used before it is initialised");
  return unpacked(*barrier);
}

void write(uint64_t* barrier, Barrier b, Initialised& m) {
  if (std::abs(b.bytes) > kBytes) fail("an mbarrier of " + std::to_string(b.bytes) + " bytes");
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1, b.pending = b.expected;
    m.past = joined(m.past, m.known.take());
  }
  *barrier = b.phase | uint64_t{b.pending} << 1 | uint64_t{b.expected} << 20 |
             static_cast<uint64_t>(b.bytes + (1 << 22)) << 39;
}

// An mbarrier of the block of this rank, which threads of the block may use behind its initialisation, other blocks and
// the accelerator only behind that thread's fence. E8.
Initialised& initialised(const uint64_t* barrier, uint32_t rank, bool by_unit) {
  read(barrier);
  auto& all = engines_in(extension_of(rank)).mbarriers;
  const auto found = all.find(barrier);
  if (found == all.end()) fail("an mbarrier is used before it is initialised");
  const Initialised& m = found->second;
  const bool fenced = by_unit || rank != position().rank;
  if (fenced && !m.fence.time) fail("an mbarrier that was initialised without a fence.mbarrier_init is used by others");
  if (!clocks().knows(agent(), fenced ? m.fence : m.by))
    fail("nothing orders the use of an mbarrier behind its initialisation");
  return found->second;
}

// ---- Boxes ----

// Eight elements of the row from `row` on, of which there are size[0]; element `first` is the first one.
void land_piece(char* to, const TensorMap& m, const char* row, int64_t first) {
  const int64_t begin = std::max<int64_t>(first, 0), end = std::min<int64_t>(first + 8, m.size[0]);
  std::memset(to, 0, 16);
  if (!row || begin >= end) return;
  const size_t bytes = 2 * static_cast<size_t>(end - begin);
  check_access(row + 2 * begin, bytes, 2);
  loaded_by_unit(row + 2 * begin, bytes);
  std::memcpy(to + 2 * (begin - first), row + 2 * begin, bytes);
}

void land(const Box& box) {
  const TensorMap& m = *box.map;
  const uint32_t first = static_cast<uint32_t>(box.shared - box.memory), span = 2 * m.box[0];
  Initialised& barrier = engines_in(extension_of(box.rank)).mbarriers.at(box.barrier);
  const Event written = clocks().next_of_unit(barrier.unit);
  const Knowing knowing{&clocks(), 0, 1, box.past};
  for (int32_t r = 0; r < m.box[1]; ++r) {
    const char* row = m.base;  // or null: outside
    for (int i = 1; i < 5; ++i) {
      const int64_t at = int64_t{box.at[i]} + (i == 1 ? r : 0);
      row = row && at >= 0 && at < m.size[i] ? row + at * m.stride[i] : nullptr;
    }
    for (int32_t c = 0; c < m.box[0]; c += 8) {
      char* to = box.memory + swizzled(first + span * r + 2 * c, span);
      touched_by_unit(to, 16, true, written, knowing);
      land_piece(to, m, row, int64_t{box.at[0]} + c);
    }
  }
  // Of what the thread did that has asked for the box, its arrival tells, not the box.
  barrier.known.add(written.agent, written.time);
  barrier.written = written;
  Barrier b = read(box.barrier);
  b.bytes -= 2 * m.box[0] * m.box[1];
  write(box.barrier, b, barrier);
}

// No mbarrier lies where the box lands.
void check_space(const Box& box) {
  const char* const end = box.shared + 2 * box.map->box[0] * box.map->box[1];
  for (const auto& found : engines_in(extension_of(box.rank)).mbarriers) {
    const auto* const barrier = reinterpret_cast<const char*>(found.first);
    if (barrier + 8 > box.shared && barrier < end) fail("a box lands on an mbarrier");
  }
}

struct Awaited {
  uint64_t* barrier;
  uint32_t parity;
};

bool completed(void* argument) {
  const auto& awaited = *static_cast<Awaited*>(argument);
  auto& boxes = engines().boxes;
  const auto is_complete = [&] {
    if (read(awaited.barrier).phase == awaited.parity) return false;
    clocks().acquire(agent(), engines().mbarriers.at(awaited.barrier).past);
    return true;
  };
  if (is_complete()) return true;
  for (size_t i = boxes.size(); i--;)  // the last first: boxes land in any order
    if (boxes[i].barrier == awaited.barrier) {
      const Box box = boxes[i];
      boxes.erase(boxes.begin() + i);
      land(box);
    }
  return is_complete();
}

// ---- Registers ----

struct Wanted {
  Engines* engines;
  int registers;  // of the warp, more than it has
};

bool has_registers(void* wanted) {
  const auto& w = *static_cast<Wanted*>(wanted);
  return w.engines->free_registers >= w.registers;
}

// What a launch gives a thread that is to have as many as there are.
int launched_registers() { return std::min(65536 / static_cast<int>(position().threads) / 8 * 8, 248); }

void nothing(void* const*) {}

// A setmaxnreg follows that of all warps of the group before.
void check_order(const Engines& all, int warp, const char* what) {
  const size_t before = all.limits[warp].size();
  for (int i = warp / kWarpsOfGroup * kWarpsOfGroup, end = i + kWarpsOfGroup; before && i < end; ++i)
    if (all.limits[i].size() < before || !clocks().knows(agent(), all.limits[i][before - 1].by))
      fail(std::string(what) + ", and nothing orders it behind the last one of the warpgroup");
}

void set_registers(int registers, bool more, const char* what, const Site& site) {
  Engines& all = engines();
  const int warp = own_index();
  if (registers < 24 || registers > 256 || registers % 8)
    fail(std::string(what) + " of " + std::to_string(registers) + ": a multiple of 8 from 24 to 256");
  const auto& mine = all.limits[warp];
  const int before = mine.empty() ? launched_registers() : mine.back().registers;
  if (more ? registers < before : registers > before)
    fail(std::string(what) + " of " + std::to_string(registers) + ", and a thread has " + std::to_string(before));
  meet_warp(nothing, nullptr, what, site);
  if (position().thread % kLanes == 0) {
    check_order(all, warp, what);
    Wanted wanted{&all, (registers - before) * kLanes};
    if (more) wait_until(has_registers, &wanted, what);
    all.free_registers -= wanted.registers;
    all.limits[warp].push_back({registers, site, clocks().now(agent())});
  }
  meet_warp(nothing, nullptr, what, site);
}

}  // namespace

uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const char*>(p) - shared_memory()); }

void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  check_shared(barrier, 8);
  stored(barrier, 8);
  if (!arrivals || arrivals > kCounts) fail("an mbarrier of " + std::to_string(arrivals) + " arrivals");
  if (engines().mbarriers.count(barrier)) fail("an mbarrier is initialised again");
  Initialised& m = engines().mbarriers[barrier];
  m = {clocks().now(agent()), {}, clocks().add_unit("the accelerator"), {}, {}, nullptr};
  write(barrier, {0, arrivals, arrivals, 0}, m);
}

void mbarrier_init_fence() {
  const Event now = clocks().now(agent());
  for (auto& [barrier, m] : engines().mbarriers)
    if (m.by.agent == agent() && !m.fence.time) m.fence = now;
  clocks().fence(agent());  // it is a fence.proxy.async, too
}

void fence_proxy_async() { clocks().fence(agent()); }

namespace {

void arrive(uint64_t* barrier, uint32_t rank, uint32_t bytes) {
  Initialised& m = initialised(barrier, rank, false);
  Barrier b = read(barrier);
  if (!b.pending) fail("more arrivals at an mbarrier than it was initialised with");
  clocks().release(agent(), m.known);
  b.bytes += static_cast<int32_t>(bytes);
  --b.pending;
  write(barrier, b, m);
}

}  // namespace

void mbarrier_arrive(uint64_t* barrier, uint32_t bytes) {
  check_shared(barrier, 8);
  arrive(barrier, position().rank, bytes);
}

void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  check_shared(barrier, 8);
  arrive(static_cast<uint64_t*>(in_block(barrier, rank)), rank, 0);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  check_shared(barrier, 8);
  initialised(barrier, position().rank, false);
  Awaited awaited{barrier, parity};
  wait_until(completed, &awaited, "an mbarrier");
}

void load_box(void* shared, const TensorMap* map, uint64_t* barrier, const int32_t (&at)[5], bool for_both) {
  const int repeats = 16 * map->box[0];  // bytes after which its swizzle does
  if (shared_address(shared) % repeats)
    fail("a box with such a swizzle begins at a multiple of " + std::to_string(repeats) + " bytes");
  check_access(map->base, 16);  // hardware looks there, wherever the box lands
  check_shared(shared, 16);
  check_shared(static_cast<char*>(shared) + 2 * map->box[0] * map->box[1] - 16, 16);
  check_shared(barrier, 8);
  const Past past = clocks().past_of(agent());
  for (uint32_t rank = 0; rank < position().cluster; ++rank) {
    if (!for_both && rank != position().rank) continue;
    Box box{static_cast<char*>(in_block(shared, rank)),
            static_cast<char*>(in_block(shared_memory(), rank)),
            rank,
            map,
            static_cast<uint64_t*>(in_block(barrier, rank)),
            {},
            past};
    std::memcpy(box.at, at, sizeof at);
    initialised(box.barrier, rank, true);
    check_space(box);
    if (lands_at_once())
      land(box);
    else
      engines_in(extension_of(rank)).boxes.push_back(box);
  }
}

void take_registers(int registers, const Site& site) { set_registers(registers, true, "setmaxnreg.inc", site); }
void give_registers(int registers, const Site& site) { set_registers(registers, false, "setmaxnreg.dec", site); }

}  // namespace vdcore::cuda::emulator
