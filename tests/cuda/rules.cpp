// Kernels that keep the rules E1 to E9 of tests/emulator/emulator.h, and for each rule kernels that break it and still
// give right numbers: only the emulator's own check tells them apart. Prints a line a kernel and order: its name, the
// order, and "right", "wrong" or what the emulator objects to.
#define VDCORE_EMULATE
#include <array>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/core/launch.h"
#include "cuda/core/ptx_sm90.h"

using namespace vdcore;
using namespace vdcore::cuda;

constexpr int kThreads = 128, kWords = 512;  // of a buffer
constexpr uint32_t kOnes = 0x3f803f80;       // two of bfloat16

enum Fault {
  kNone,
  kBase,           // E1
  kResultWritten,  // E2
  kOperandWritten,
  kLateRegisters,    // E3
  kOtherDescriptor,  // E4
  kLostWarp,
  kTooManyRegisters,  // E5
  kOddRegisters,
  kHalfWarps,  // E6
  kBarrier16,
  kBarrierOfForty,
  kNoProxyFence,  // E8
  kTwoBlocks,     // E9
  kTwoThreads,
  kConstantLoad
};

struct Arguments {
  const uint32_t* in;
  uint32_t* out;
  TensorMap map;
  int32_t first;  // row of the map that the box begins at
};

// ---- E1: a box of 8 rows of 64 elements, by the tensor memory accelerator ----

void boxed(const Arguments a) {
  char* const tile = shared_memory();
  auto* const barrier = reinterpret_cast<uint64_t*>(shared_memory() + 2048);
  const uint32_t i = thread_index();
  if (i == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  sync_block();
  if (i == 0) {
    mbarrier_arrive_expect(barrier, 1024);
    load_box(tile, &a.map, barrier, kReadOnce, 0, a.first, 0, 0, 0);
  }
  mbarrier_wait(barrier, 0);
  const uint32_t row = i % 8;
  store_global(a.out + i, load_shared<uint32_t>(tile + 128 * row + 16 * row));  // its first piece, swizzled
}

TensorMap map_of(const void* base) {
  TensorMap map{};
  map.base = static_cast<const char*>(base);
  const int64_t size[5] = {64, 1000, 1, 1, 1}, stride[5] = {2, 128, 16, 16, 16};
  std::memcpy(map.size, size, sizeof size);
  std::memcpy(map.stride, stride, sizeof stride);
  map.box[0] = 64, map.box[1] = 8;
  return map;
}

// ---- E2, E3, E4, E8: ones times ones, twice, from registers and shared memory ----

template <Fault kFault>
void multiplied(const Arguments a) {
  auto* const cells = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t i = thread_index();
  for (uint32_t x = i; x < 2048; x += kThreads) store_shared(cells + x, kOnes);
  if (kFault != kNoProxyFence) emulator::fence_proxy_async();
  sync_block();
  const bool other = kFault == kOtherDescriptor && i / 32 == 3;
  const uint64_t tile = columns_descriptor<64>(other ? 4096 : 0, 2048);
  float d[4];
  uint32_t first[4], second[4];
  bool same = true;
  for (int round = 0; round < 2; ++round) {
    for (float& x : d) x = 0;
    for (uint32_t& x : first) x = kOnes;
    for (uint32_t& x : second) x = kFault == kLateRegisters ? 0 : kOnes;
    if (kFault == kLostWarp && i / 32 == 3) {
      for (float& x : d) x = 32;
    } else {
      wgmma_fence();
      Wgmma<bf16, 8>::registers_times_columns(d, first, tile);
      for (uint32_t& x : second) x = kOnes;
      Wgmma<bf16, 8>::registers_times_columns(d, second, tile);
      wgmma_commit();
      if (kFault == kResultWritten) d[1] = 5;
      wgmma_wait<0>();
    }
    for (const float x : d) same = same && x == 32;
  }
  store_global(a.out + i, load_global<uint32_t>(a.in + i) + (same ? 0 : 1));
}

// The first operand changes in flight, in a row that no thread looks at.
void overwritten(const Arguments a) {
  auto* const cells = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t i = thread_index();
  for (uint32_t x = i; x < 1024; x += kThreads) store_shared(cells + x, kOnes);
  emulator::fence_proxy_async();
  sync_block();
  float d[4] = {};
  uint32_t first[4] = {kOnes, kOnes, kOnes, kOnes};
  wgmma_fence();
  Wgmma<bf16, 8>::registers_times_columns(d, first, columns_descriptor<64>(0, 2048));
  wgmma_commit();
  first[2] = 0;
  wgmma_wait<0>();
  store_global(a.out + i, load_global<uint32_t>(a.in + i) + (d[3] == 16 ? 0 : 1));
}

// ---- E5: one warpgroup gives registers to three ----

template <Fault kFault>
void given(const Arguments a) {
  const uint32_t i = thread_index();
  if (i < 128)
    give_registers<kFault == kTooManyRegisters ? 40 : 32>();
  else
    take_registers<kFault == kOddRegisters ? 156 : 160>();
  if (i < kThreads) store_global(a.out + i, load_global<uint32_t>(a.in + i));
}

// ---- E6: barriers ----

template <Fault kFault>
void met(const Arguments a) {
  auto* const cells = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t i = thread_index();
  store_shared(cells + i, load_global<uint32_t>(a.in + i));
  sync_block();
  if (kFault == kHalfWarps && i % 32 < 16) named_barrier_wait(1, 64);
  if (kFault == kBarrier16) named_barrier_wait(16, kThreads);
  if (kFault == kBarrierOfForty && i < 40) named_barrier_wait(1, 40);
  if (kFault == kNone) named_barrier_wait(15, kThreads);
  store_global(a.out + i, load_shared<uint32_t>(cells + i));
}

// ---- E7: a launch that asks for too much ----

struct Large {
  Arguments a;
  char more[4096];
};
void copied(const Arguments a) {
  const uint32_t i = thread_index();
  if (i < kThreads) store_global(a.out + i, load_global<uint32_t>(a.in + i));
}
void copied_large(const Large large) { copied(large.a); }

// ---- E9: who writes, and who reads it ----

template <Fault kFault>
void stored(const Arguments a) {
  const uint32_t i = thread_index();
  const uint32_t x = load_global<uint32_t>(a.in + i);
  if (kFault == kTwoBlocks || block_index() == 0) store_global(a.out + i, x);
  if (block_index() != 0) return;
  if (kFault == kTwoThreads && i == 40) store_global(a.out, load_global<uint32_t>(a.in));
  sync_block();
  const uint32_t back =
      kFault == kConstantLoad ? load_global<uint32_t>(a.out + 127 - i) : load_written<uint32_t>(a.out + 127 - i);
  sync_block();
  store_global(a.out + 127 - i, back);
}

// ---- Running them ----

struct Launch {
  int64_t blocks = 1;
  int threads = kThreads;
  size_t shared = 8192;
  int shift = 0;  // rows that the map's base lies before its tensor
};

template <typename Parameters>
void run(const char* name, void (*kernel)(Parameters), Launch how = {}) {
  const struct {
    const char* name;
    emulator::Order order;
    uint64_t seed;
  } orders[] = {{"forward", emulator::Order::forward, 0},
                {"backward", emulator::Order::backward, 0},
                {"random", emulator::Order::random, 1}};
  for (const auto& order : orders) {
    alignas(16) static std::array<uint32_t, kWords> in;
    std::vector<uint32_t> out(kThreads, 0xdead);
    for (int i = 0; i < kWords; ++i) in[i] = 1000 + i;
    emulator::set_order(order.order, order.seed);
    emulator::expose(in.data(), in.data() + in.size());
    emulator::expose(out.data(), out.data() + out.size());
    Parameters parameters{};
    Arguments arguments{in.data(), out.data(), map_of(reinterpret_cast<const char*>(in.data()) - 128 * how.shift),
                        how.shift};
    std::memcpy(static_cast<void*>(&parameters), &arguments, sizeof arguments);
    const bool boxes = how.shared == 4096;  // whose result is the first word of row i % 8
    try {
      launch({name}, kernel, {how.blocks, how.threads, how.shared}, parameters);
      bool right = true;
      for (uint32_t i = 0; i < kThreads; ++i) right = right && out[i] == 1000 + (boxes ? i % 8 * 32 : i);
      std::printf("%s %s %s\n", name, order.name, right ? "right" : "wrong");
    } catch (const std::exception& error) {
      std::printf("%s %s %s\n", name, order.name, error.what());
    }
    emulator::expose_nothing();
  }
}

int main() {
  run("E1-right", boxed, {1, kThreads, 4096});
  run("E1-base-before-the-tensor", boxed, {1, kThreads, 4096, 100});
  run("E2-right", multiplied<kNone>);
  run("E2-result-written-in-flight", multiplied<kResultWritten>);
  run("E2-operand-written-in-flight", overwritten);
  run("E3-registers-written-after-the-fence", multiplied<kLateRegisters>);
  run("E4-one-warp-with-another-descriptor", multiplied<kOtherDescriptor>);
  run("E4-a-warp-without-its-product", multiplied<kLostWarp>);
  run("E5-right", given<kNone>, {1, 512});
  run("E5-more-registers-than-there-are", given<kTooManyRegisters>, {1, 512});
  run("E5-no-multiple-of-8", given<kOddRegisters>, {1, 512});
  run("E6-right", met<kNone>);
  run("E6-half-warps", met<kHalfWarps>);
  run("E6-barrier-16", met<kBarrier16>);
  run("E6-forty-threads", met<kBarrierOfForty>);
  run("E7-right", copied, {1, 1024, 227 << 10});
  run("E7-threads", copied, {1, 1056, 8192});
  run("E7-shared-memory", copied, {1, kThreads, (227 << 10) + 1});
  run("E7-parameters", copied_large);
  run("E8-no-fence-of-the-proxy", multiplied<kNoProxyFence>);
  run("E9-right", stored<kNone>, {2});
  run("E9-two-blocks-write", stored<kTwoBlocks>, {2});
  run("E9-two-threads-write", stored<kTwoThreads>);
  run("E9-constant-load-of-what-is-written", stored<kConstantLoad>);
}
