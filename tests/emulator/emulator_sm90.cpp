#include "emulator/emulator_sm90.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "emulator/emulator.h"

namespace vdcore::cuda::emulator {
namespace {

constexpr int kLanes = 32, kWarpsOfGroup = 4, kMostWarps = 32;
constexpr uint32_t kInFlight = 0x7fc0dead;  // a NaN: what registers of a result hold until it has been waited for

float in_flight() {
  float x;
  std::memcpy(&x, &kInFlight, 4);
  return x;
}

// ---- State of a block ----

struct Box {
  char* shared;
  char* memory;  // of the block that it is in
  const TensorMap* map;
  uint64_t* barrier;
  int32_t at[5];
};

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

  std::vector<uint32_t> now() const {
    std::vector<uint32_t> found(kLanes * words);
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(&found[lane * words], of[lane], 4 * words);
    return found;
  }
  bool changed() const { return held != now(); }
};

struct Product {
  Operands operands;
  const uint32_t* a[kLanes];
  Registers values;  // of a
  std::shared_ptr<Sum> sum;
  int group;
  bool done;
};

struct Products {  // of a warp: a warp does 16 rows of its warpgroup's product by itself
  bool fenced = false;
  int open = 0;  // number of the group that the next product joins
  std::vector<Product> list;
  std::vector<Registers> known;  // operands so far, as the last fence saw them
};

// What a warp told wgmma between two commits, without its own registers.
struct Told {
  uint64_t a, b;
  int n, flags;
  bool operator==(const Told& x) const { return a == x.a && b == x.b && n == x.n && flags == x.flags; }
};
struct Warpgroup {
  std::vector<std::vector<Told>> groups;  // by the first warp that committed each
  std::vector<int> warps;                 // that have committed it
  int committed[kWarpsOfGroup] = {};
  std::vector<Told> open[kWarpsOfGroup];
};

struct Engines : Extension {
  std::vector<Box> boxes;
  Products warps[kMostWarps];
  Warpgroup warpgroups[kMostWarps / kWarpsOfGroup];
  int free_registers = 0;
  int registers[kMostWarps] = {};   // of a thread, by warp; 0: those of the launch
  int limits_set[kMostWarps] = {};  // setmaxnreg of each warp
  std::string finish() override {
    if (!boxes.empty()) return "the block ends before its boxes have landed";
    for (const Products& warp : warps)
      if (!warp.list.empty()) return "the block ends before its wgmma have been waited for";
    for (const Warpgroup& group : warpgroups)
      for (const int warps_of : group.warps)
        if (warps_of != kWarpsOfGroup) return "wgmma by some warps of a warpgroup only";
    for (int i = 0; i < kMostWarps; ++i)
      if (limits_set[i] != limits_set[i / kWarpsOfGroup * kWarpsOfGroup])
        return "setmaxnreg by some warps of a warpgroup only";
    return "";
  }
};

Engines& engines_in(std::unique_ptr<Extension>& block) {
  if (!block) block.reset(new Engines);
  return static_cast<Engines&>(*block);
}
Engines& engines() { return engines_in(extension()); }

// ---- mbarrier: phase, arrivals that are pending and expected, bytes, in the 64 bits themselves ----

struct Barrier {
  uint32_t phase, pending, expected;
  int32_t bytes;
};
constexpr uint32_t kCounts = (1u << 19) - 1;

// In this block, or in another one of the cluster.
Barrier read(const uint64_t* barrier) {
  const uint64_t x = *barrier;
  if (x == ~uint64_t{0}) fail("an mbarrier is used before it is initialised");
  return {static_cast<uint32_t>(x & 1), static_cast<uint32_t>(x >> 1) & kCounts,
          static_cast<uint32_t>(x >> 20) & kCounts, static_cast<int32_t>(x >> 39) - (1 << 22)};
}

void write(uint64_t* barrier, Barrier b) {
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.expected;
  *barrier = b.phase | uint64_t{b.pending} << 1 | uint64_t{b.expected} << 20 |
             static_cast<uint64_t>(b.bytes + (1 << 22)) << 39;
}

// ---- Boxes ----

char* at_address(uint32_t address) { return shared_memory() + address; }
// `span`: bytes of the swizzle, 128 or 64.
uint32_t swizzled(uint32_t address, uint32_t span) { return address ^ (address >> 7 & (span / 16 - 1)) << 4; }

void land(const Box& box) {
  const TensorMap& m = *box.map;
  const uint32_t first = static_cast<uint32_t>(box.shared - box.memory), span = 2 * m.box[0];
  for (int32_t r = 0; r < m.box[1]; ++r)
    for (int32_t c = 0; c < m.box[0]; ++c) {
      const int64_t at[5] = {int64_t{box.at[0]} + c, int64_t{box.at[1]} + r, box.at[2], box.at[3], box.at[4]};
      bool inside = true;
      int64_t offset = 0;
      for (int i = 0; i < 5; ++i) {
        inside = inside && at[i] >= 0 && at[i] < m.size[i];
        offset += at[i] * m.stride[i];
      }
      char* to = box.memory + swizzled(first + span * r + 2 * c, span);
      if (inside) check_access(m.base + offset, 2);
      if (inside)
        std::memcpy(to, m.base + offset, 2);
      else
        std::memset(to, 0, 2);
      written_async(to, 2);
    }
  Barrier b = read(box.barrier);
  b.bytes -= 2 * m.box[0] * m.box[1];
  write(box.barrier, b);
}

struct Awaited {
  uint64_t* barrier;
  uint32_t parity;
};

bool completed(void* argument) {
  const auto& awaited = *static_cast<Awaited*>(argument);
  auto& boxes = engines().boxes;
  if (read(awaited.barrier).phase != awaited.parity) return true;
  for (size_t i = boxes.size(); i--;)  // the last first: boxes land in any order
    if (boxes[i].barrier == awaited.barrier) {
      const Box box = boxes[i];
      boxes.erase(boxes.begin() + i);
      land(box);
    }
  return read(awaited.barrier).phase != awaited.parity;
}

// ---- Products ----

float value(DType type, uint16_t bits) {
  if (type == DType::bf16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31 ? (mantissa ? std::numeric_limits<float>::quiet_NaN() : INFINITY)
                     : exponent     ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                                    : std::ldexp(static_cast<float>(mantissa), -24);
  return bits >> 15 ? -size : size;
}

float shared_value(DType type, uint32_t address, uint32_t span) {
  const char* p = at_address(swizzled(address, span));
  check_access(p, 2);
  read_async(p, 2);
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return value(type, bits);
}

struct Descriptor {
  uint32_t address, leading, stride, span;
  explicit Descriptor(uint64_t x)
      : address((x & 0x3fff) << 4), leading((x >> 16 & 0x3fff) << 4), stride((x >> 32 & 0x3fff) << 4) {
    if (x >> 62 != 1 && x >> 62 != 2) fail("a matrix descriptor without a swizzle of 128 or 64 bytes");
    if (x >> 49 & 7) fail("a matrix descriptor with a base offset");
    span = x >> 62 == 1 ? 128 : 64;
  }
};

int result_row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
int result_column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

void multiply(Product& p, int warp) {
  const Operands& o = p.operands;
  const int n = o.n;
  if (o.a && p.values.changed()) fail("registers of a wgmma in flight are written: its first operand");
  float a[16][16];
  std::vector<float> b(16 * n);
  const Descriptor right(o.b_descriptor);
  const int columns = static_cast<int>(right.span) / 2;
  if (o.columns && n > columns && n % columns) fail("a product of which columns of its operand are no divisor");
  for (int k = 0; k < 16; ++k)
    for (int j = 0; j < n; ++j) {
      const uint32_t at =
          o.columns ? j / columns * right.leading + k / 8 * right.stride + k % 8 * right.span + j % columns * 2
                    : j / 8 * right.stride + j % 8 * right.span + 2 * k;
      b[k * n + j] = shared_value(o.type, right.address + at, right.span);
    }
  if (o.a) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 8; ++i)
        a[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] =
            value(o.type, static_cast<uint16_t>(p.a[lane][i / 2] >> 16 * (i % 2)));
  } else {
    const Descriptor left(o.a_descriptor);
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < 16; ++k) {
        const uint32_t row = 16 * (warp % 4) + r;
        a[r][k] = shared_value(o.type, left.address + row / 8 * left.stride + row % 8 * left.span + 2 * k, left.span);
      }
  }
  float* rows = p.sum->rows.data();
  if (!o.add) std::fill_n(rows, 16 * n, 0.f);
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < n; ++j) rows[r * n + j] += a[r][k] * b[k * n + j];
  p.done = true;
}

Products& own_warp() { return engines().warps[position().thread / kLanes]; }
int own_index() { return static_cast<int>(position().thread / kLanes); }

// The result so far leaves the registers: they hold NaN until a wait.
std::shared_ptr<Sum> begin_sum(void* const* lanes, int n) {
  auto sum = std::make_shared<Sum>();
  sum->rows.resize(16 * n);
  sum->at_once = lands_at_once();
  for (int lane = 0; lane < kLanes; ++lane) {
    sum->d[lane] = static_cast<Operands*>(lanes[lane])->d;
    for (int i = 0; i < n / 2; ++i) {
      float& d = sum->d[lane][i];
      sum->rows[result_row(lane, i) * n + result_column(lane, i)] = d;
      d = in_flight();
    }
  }
  return sum;
}

Registers registers_of(void* const* lanes, bool of_result, size_t words) {
  Registers found{{}, words, {}};
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& o = *static_cast<Operands*>(lanes[lane]);
    found.of[lane] = of_result ? static_cast<const void*>(o.d) : o.a;
  }
  found.held = found.now();
  return found;
}

// Registers that were operands before and have changed since the last fence.
void check_fence(Products& warp, const Registers& mine) {
  for (Registers& known : warp.known)
    if (known.of[0] == mine.of[0] && known.words == mine.words) {
      if (known.held != mine.held) fail("wgmma of registers that were written after the last wgmma.fence");
      return;
    }
  warp.known.push_back(mine);
}

void tell(const Operands& o) {
  Warpgroup& group = engines().warpgroups[own_index() / kWarpsOfGroup];
  const int flags = o.columns | o.add << 1 | (o.a != nullptr) << 2;
  group.open[own_index() % kWarpsOfGroup].push_back({o.a_descriptor, o.b_descriptor, o.n, flags});
}

void meet_product(void* const* lanes) {
  Products& warp = own_warp();
  Product p{*static_cast<Operands*>(lanes[0]), {}, {}, nullptr, warp.open, false};
  if (!warp.fenced) fail("wgmma without a wgmma.fence since the last wait");
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& other = *static_cast<Operands*>(lanes[lane]);
    if (other.a_descriptor != p.operands.a_descriptor || other.b_descriptor != p.operands.b_descriptor)
      fail("lanes give wgmma different descriptors");
    p.a[lane] = other.a;
  }
  tell(p.operands);
  if (p.operands.a) {
    p.values = registers_of(lanes, false, 4);
    check_fence(warp, p.values);
  }
  for (const Product& earlier : warp.list)
    if (earlier.operands.d == p.operands.d) p.sum = earlier.sum;
  if (!p.sum) {  // else it adds to what is in flight, which needs no fence
    check_fence(warp, registers_of(lanes, true, p.operands.n / 2));
    p.sum = begin_sum(lanes, p.operands.n);
  }
  if (p.sum->at_once) multiply(p, own_index());
  warp.list.push_back(std::move(p));
}

// The result of `sum` goes to its registers, which nobody may have touched.
void land_sum(const Sum& sum, int n) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int r = 0; r < n / 2; ++r) {
      uint32_t bits;
      std::memcpy(&bits, &sum.d[lane][r], 4);
      if (bits != kInFlight) fail("registers of a wgmma in flight are written: its result");
      sum.d[lane][r] = sum.rows[result_row(lane, r) * n + result_column(lane, r)];
    }
}

void meet_wait(void* const* lanes) {
  Products& warp = own_warp();
  const int left = *static_cast<int*>(lanes[0]);
  size_t done = 0;
  for (; done < warp.list.size() && warp.list[done].group < warp.open - left; ++done) {
    Product& p = warp.list[done];
    if (!p.done) multiply(p, own_index());
    if (p.operands.a && p.values.changed()) fail("registers of a wgmma in flight are written: its first operand");
  }
  for (size_t i = 0; i < done; ++i) {
    const Product& p = warp.list[i];
    bool last = true;
    for (size_t j = i + 1; j < warp.list.size(); ++j) last = last && warp.list[j].sum != p.sum;
    if (last) land_sum(*p.sum, p.operands.n);
  }
  warp.list.erase(warp.list.begin(), warp.list.begin() + done);
  warp.fenced = false;
}

bool no_longer(void* polls) { return --*static_cast<int*>(polls) < 0; }

void meet_fence(void* const*) {
  own_warp().fenced = true;
  for (Registers& known : own_warp().known) known.held = known.now();
}

void meet_commit(void* const*) {
  ++own_warp().open;
  Warpgroup& group = engines().warpgroups[own_index() / kWarpsOfGroup];
  const int warp = own_index() % kWarpsOfGroup;
  const size_t number = group.committed[warp]++;
  if (number == group.groups.size()) group.groups.push_back(group.open[warp]), group.warps.push_back(0);
  if (!(group.groups[number] == group.open[warp])) fail("the warps of a warpgroup issue different wgmma");
  ++group.warps[number];
  group.open[warp].clear();
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

void set_registers(int registers, bool more, const char* what) {
  Engines& all = engines();
  const int warp = own_index();
  if (registers < 24 || registers > 256 || registers % 8)
    fail(std::string(what) + " of " + std::to_string(registers) + ": a multiple of 8 from 24 to 256");
  const int before = all.registers[warp] ? all.registers[warp] : launched_registers();
  if (more ? registers < before : registers > before)
    fail(std::string(what) + " of " + std::to_string(registers) + ", and a thread has " + std::to_string(before));
  meet_warp(nothing, nullptr, what);
  if (position().thread % kLanes == 0) {
    Wanted wanted{&all, (registers - before) * kLanes};
    if (more) wait_until(has_registers, &wanted, what);
    all.free_registers -= wanted.registers;
    all.registers[warp] = registers;
    ++all.limits_set[warp];
  }
  meet_warp(nothing, nullptr, what);
}

}  // namespace

uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const char*>(p) - shared_memory()); }

void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  check_access(barrier, 8);
  *barrier = 0;
  write(barrier, {0, arrivals, arrivals, 0});
}

namespace {

void arrive(uint64_t* barrier, uint32_t bytes) {
  Barrier b = read(barrier);
  if (!b.pending) fail("more arrivals at an mbarrier than it was initialised with");
  b.bytes += static_cast<int32_t>(bytes);
  --b.pending;
  write(barrier, b);
}

}  // namespace

void mbarrier_arrive(uint64_t* barrier, uint32_t bytes) {
  check_access(barrier, 8);
  arrive(barrier, bytes);
}

void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  check_access(barrier, 8);
  arrive(static_cast<uint64_t*>(in_block(barrier, rank)), 0);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  check_access(barrier, 8);
  Awaited awaited{barrier, parity};
  wait_until(completed, &awaited, "an mbarrier");
}

void load_box(void* shared, const TensorMap* map, uint64_t* barrier, const int32_t (&at)[5], bool for_both) {
  const int repeats = 16 * map->box[0];  // bytes after which its swizzle does
  if (shared_address(shared) % repeats)
    fail("a box with such a swizzle begins at a multiple of " + std::to_string(repeats) + " bytes");
  check_access(map->base, 16);  // hardware looks there, wherever the box lands
  check_access(shared, 16);
  check_access(static_cast<char*>(shared) + 2 * map->box[0] * map->box[1] - 16, 16);
  check_access(barrier, 8);
  for (uint32_t rank = 0; rank < position().cluster; ++rank) {
    if (!for_both && rank != position().rank) continue;
    Box box{static_cast<char*>(in_block(shared, rank)),
            static_cast<char*>(in_block(shared_memory(), rank)),
            map,
            static_cast<uint64_t*>(in_block(barrier, rank)),
            {}};
    std::memcpy(box.at, at, sizeof at);
    if (lands_at_once())
      land(box);
    else
      engines_in(extension_of(rank)).boxes.push_back(box);
  }
}

void take_registers(int registers) { set_registers(registers, true, "setmaxnreg.inc"); }
void give_registers(int registers) { set_registers(registers, false, "setmaxnreg.dec"); }

void wgmma_fence() { meet_warp(meet_fence, nullptr, "wgmma.fence"); }

void wgmma(const Operands& mine) { meet_warp(meet_product, const_cast<Operands*>(&mine), "wgmma.mma_async"); }

void wgmma_commit() { meet_warp(meet_commit, nullptr, "wgmma.commit_group"); }

// Products take their time: who else can run does so first, and may spoil what they have yet to read.
void wgmma_wait(int groups_left) {
  int polls = 1;
  if (!lands_at_once()) wait_until(no_longer, &polls, "wgmma.wait_group");
  meet_warp(meet_wait, &groups_left, "wgmma.wait_group");
}

}  // namespace vdcore::cuda::emulator
