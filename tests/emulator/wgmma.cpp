// wgmma under the emulator: products of a warpgroup, by warps that each take 16 of its rows.
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cuda/core/ptx.h"
#include "emulator/engines.h"

namespace vdcore::cuda::emulator {

std::vector<uint32_t> Registers::now() const {
  std::vector<uint32_t> found(kLanes * words);
  for (int lane = 0; lane < kLanes; ++lane) std::memcpy(&found[lane * words], of[lane], 4 * words);
  return found;
}

namespace {

constexpr uint32_t kInFlight = 0x7fc0dead;  // a NaN: what registers of a result hold until it has been waited for

float value(DType type, uint16_t bits) {
  return type == DType::bf16 ? emulated::element<bf16>(bits) : emulated::element<f16>(bits);
}

float shared_value(DType type, uint32_t address, uint32_t span) {
  uint16_t bits;
  std::memcpy(&bits, shared_memory() + swizzled(address, span), 2);
  return value(type, bits);
}

struct Descriptor {
  uint32_t address, leading, stride, span;
  explicit Descriptor(uint64_t x)
      : address((x & 0x3fff) << 4), leading((x >> 16 & 0x3fff) << 4), stride((x >> 32 & 0x3fff) << 4) {
    if (x >> 62 != 1 && x >> 62 != 2) fail("a matrix descriptor without a swizzle of 128 or 64 bytes");
    if (x >> 49 & 7) fail("a matrix descriptor with a base offset");
    span = x >> 62 == 1 ? 128 : 64;
    if (address % (8 * span) >= span) fail("a matrix descriptor that begins within its swizzle's eight rows");
  }

  // Where an element is: of K along a row of the first or second operand, or of columns along a row of K.
  uint32_t of_row(int row, int k) const { return address + row / 8 * stride + row % 8 * span + 2 * k; }
  uint32_t of_columns(int k, int j) const {
    const int columns = static_cast<int>(span) / 2;
    return address + j / columns * leading + k / 8 * stride + k % 8 * span + j % columns * 2;
  }
};

// Of elements of the result and of a first operand in registers.
int result_row(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
int result_column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

void multiply(Product& p, int warp) {
  const Operands& o = p.operands;
  const int n = o.n;
  if (o.a && p.values.changed()) fail("registers of a wgmma in flight are written: its first operand");
  float a[16][16];
  std::vector<float> b(16 * n);
  const Descriptor right(o.b_descriptor);
  for (int k = 0; k < 16; ++k)
    for (int j = 0; j < n; ++j)
      b[k * n + j] = shared_value(o.type, o.columns ? right.of_columns(k, j) : right.of_row(j, k), right.span);
  if (o.a) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 8; ++i)
        a[result_row(lane, i)][result_column(lane, i)] =
            value(o.type, static_cast<uint16_t>(p.a[lane][i / 2] >> 16 * (i % 2)));
  } else {
    const Descriptor left(o.a_descriptor);
    for (int r = 0; r < 16; ++r)
      for (int k = 0; k < 16; ++k) a[r][k] = shared_value(o.type, left.of_row(16 * (warp % 4) + r, k), left.span);
  }
  float* rows = p.sum->rows.data();
  if (!o.add) std::fill_n(rows, 16 * n, 0.f);
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < n; ++j) rows[r * n + j] += a[r][k] * b[k * n + j];
  p.done = true;
}

Products& own_warp() { return engines().warps[own_index()]; }

// The reads of a product, in pieces of eight elements: they end when it has been waited for.
void read_operands(Product& p, Products& warp) {
  if (!warp.unit) warp.unit = clocks().add_unit("wgmma of warp " + std::to_string(own_index()));
  p.read = clocks().next_of_unit(warp.unit);
  const Knowing knowing{&clocks(), agent() / kLanes * kLanes, kLanes, nullptr};
  const auto read = [&](const Descriptor& in, uint32_t at) {
    const char* piece = shared_memory() + swizzled(at, in.span);
    check_access(piece, 16);
    touched_by_unit(piece, 16, false, p.read, knowing);
  };
  const Operands& o = p.operands;
  const Descriptor right(o.b_descriptor);
  const int columns = static_cast<int>(right.span) / 2;
  if (o.columns && o.n > columns && o.n % columns) fail("a product of which columns of its operand are no divisor");
  if (o.columns) {
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < o.n; j += 8) read(right, right.of_columns(k, j));
  } else {
    for (int j = 0; j < o.n; ++j)
      for (int k = 0; k < 16; k += 8) read(right, right.of_row(j, k));
  }
  if (o.a) return;
  const Descriptor left(o.a_descriptor);
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; k += 8) read(left, left.of_row(16 * (own_index() % kWarpsOfGroup) + r, k));
}

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
      std::memcpy(&d, &kInFlight, 4);
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

// Registers are variables of the lanes: none has changed since the last fence, or is younger.
void check_fence(const Products& warp, const Registers& mine) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const Variables& seen = warp.fence[lane];
    const char* const begin = static_cast<const char*>(mine.of[lane]);
    if (begin < seen.begin || begin + 4 * mine.words > seen.end ||
        std::memcmp(begin, seen.held.data() + (begin - seen.begin), 4 * mine.words) != 0)
      fail("wgmma of registers that were written after the last wgmma.fence");
  }
}

void tell(const Operands& o) {
  Warpgroup& group = engines().warpgroups[own_index() / kWarpsOfGroup];
  const int flags = o.columns | o.add << 1 | (o.a != nullptr) << 2 | static_cast<int>(o.type) << 3;
  group.open[own_index() % kWarpsOfGroup].push_back({o.a_descriptor, o.b_descriptor, o.n, flags, o.site});
}

void meet_product(void* const* lanes) {
  Products& warp = own_warp();
  Product p{*static_cast<Operands*>(lanes[0]), {}, {}, nullptr, warp.open, {}, false};
  if (!warp.fenced) fail("wgmma without a wgmma.fence since the last wait");
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& other = *static_cast<Operands*>(lanes[lane]);
    if (other.a_descriptor != p.operands.a_descriptor || other.b_descriptor != p.operands.b_descriptor)
      fail("lanes give wgmma different descriptors");
    if (other.add != p.operands.add) fail("lanes give wgmma different scale-d");
    if (other.n != p.operands.n || other.type != p.operands.type || other.columns != p.operands.columns ||
        !other.a != !p.operands.a)
      fail("lanes give wgmma different shapes or types");
    p.a[lane] = other.a;
  }
  tell(p.operands);
  if (p.operands.a) {
    p.values = registers_of(lanes, false, 4);
    check_fence(warp, p.values);
  }
  for (const Product& earlier : warp.list)
    if (earlier.operands.d == p.operands.d) {
      if (earlier.operands.n != p.operands.n) fail("wgmma of another shape adds to a result in flight");
      p.sum = earlier.sum;
    }
  if (!p.sum) {  // else it adds to what is in flight, which needs no fence
    check_fence(warp, registers_of(lanes, true, p.operands.n / 2));
    p.sum = begin_sum(lanes, p.operands.n);
  }
  read_operands(p, warp);
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
  if (done) {  // and the reads of operands are past to all lanes
    Gathered known;
    known.add(warp.unit, warp.list[done - 1].read.time);
    const Past past = known.take();
    for (uint32_t i = 0, first = agent() / kLanes * kLanes; i < kLanes; ++i) clocks().acquire(first + i, past);
  }
  warp.list.erase(warp.list.begin(), warp.list.begin() + done);
  warp.fenced = false;
}

bool no_longer(void* polls) { return --*static_cast<int*>(polls) < 0; }

void meet_fence(void* const* lanes) {
  Products& warp = own_warp();
  warp.fenced = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    Variables& seen = warp.fence[lane];
    seen.begin = static_cast<Variables*>(lanes[lane])->begin, seen.end = static_cast<Variables*>(lanes[lane])->end;
    seen.held.assign(seen.begin, seen.end);
  }
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

}  // namespace

void wgmma_fence(const Site& site) {
  Variables mine{static_cast<const char*>(__builtin_frame_address(0)), stack_end(), {}};
  meet_warp(meet_fence, &mine, "wgmma.fence", site);
}

void wgmma(const Operands& mine) {
  meet_warp(meet_product, const_cast<Operands*>(&mine), "wgmma.mma_async", mine.site);
}

void wgmma_commit(const Site& site) { meet_warp(meet_commit, nullptr, "wgmma.commit_group", site); }

// Products take their time: who else can run does so first, and may spoil what they have yet to read.
void wgmma_wait(int groups_left, const Site& site) {
  int polls = 1;
  if (!lands_at_once()) wait_until(no_longer, &polls, "wgmma.wait_group");
  meet_warp(meet_wait, &groups_left, "wgmma.wait_group", site);
}

}  // namespace vdcore::cuda::emulator
