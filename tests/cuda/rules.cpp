// Kernels that keep the rules E1 to E5 and E7 of tests/emulator/emulator.h, of units and launches, and for each rule
// kernels that break it and still give right numbers: only the emulator's own check tells them apart. Prints a line a
// kernel and order: its name, the order, and "right", "wrong" or what the emulator objects to.
#include "rules.h"

enum Fault {
  kNone,
  kResultWritten,  // E2
  kLateRegisters,  // E3
  kLateResult,
  kLateOperand,
  kOtherDescriptor,  // E4
  kOtherPlace,
  kWithinSwizzle,
  kLostWarp,
  kOtherScale,
  kTooManyRegisters,  // E5
  kOddRegisters,
  kTwoNumbers,
  kTwoPlaces,
  kNoBarrier
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

// ---- E2, E3, E4: ones times ones, twice, from registers and shared memory ----

template <Fault kFault>
void multiplied(const Arguments a) {
  auto* const cells = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t i = thread_index();
  for (uint32_t x = i; x < 2048; x += kThreads) store_shared(cells + x, kOnes);
  emulator::fence_proxy_async();
  sync_block();
  const bool other = kFault == kOtherDescriptor && i / 32 == 3;
  const uint64_t tile = columns_descriptor<64>(other ? 4096 : kFault == kWithinSwizzle ? 128 : 0, 2048);
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
      if (kFault == kOtherPlace && i / 32 == 3)
        Wgmma<bf16, 8>::registers_times_columns(d, first, tile);
      else
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

// Registers that no product has used before are written behind the fence: of the result, of the first operand. Or one
// lane adds to a result of zeros, and the others begin it.
template <Fault kFault>
void multiplied_once(const Arguments a) {
  auto* const cells = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t i = thread_index();
  for (uint32_t x = i; x < 2048; x += kThreads) store_shared(cells + x, kOnes);
  emulator::fence_proxy_async();
  sync_block();
  float d[4];
  uint32_t first[4];
  for (float& x : d) x = kFault == kLateResult ? 7 : 0;
  for (uint32_t& x : first) x = kFault == kLateOperand ? 0 : kOnes;
  wgmma_fence();
  if (kFault == kLateResult) d[3] = d[2] = d[1] = d[0] = 0;
  for (uint32_t& x : first) x = kOnes;
  const uint64_t tile = kFault == kOtherScale ? rows_descriptor(0) : columns_descriptor<64>(0, 2048);
  using Product = Wgmma<bf16, 8>;
  if (kFault != kOtherScale)
    Product::registers_times_columns(d, first, tile);
  else  // on one line: a predicate that one lane has otherwise
    i == 37 ? Product::rows_times_rows<true>(d, tile, tile) : Product::rows_times_rows<false>(d, tile, tile);
  wgmma_commit();
  wgmma_wait<0>();
  bool same = true;
  for (const float x : d) same = same && x == 16;
  store_global(a.out + i, load_global<uint32_t>(a.in + i) + (same ? 0 : 1));
}

// Without a fence between, a product adds to the result of one of half its columns, which is in flight.
void widened(const Arguments a) {
  auto* const cells = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t i = thread_index();
  for (uint32_t x = i; x < 2048; x += kThreads) store_shared(cells + x, kOnes);
  emulator::fence_proxy_async();
  sync_block();
  float d[8] = {};
  const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
  wgmma_fence();
  Wgmma<bf16, 8>::registers_times_columns(reinterpret_cast<float (&)[4]>(d), ones, columns_descriptor<64>(0, 2048));
  Wgmma<bf16, 16>::registers_times_columns(d, ones, columns_descriptor<64>(0, 2048));
  wgmma_commit();
  wgmma_wait<0>();
  const bool same = d[0] == 32 && d[7] == 16;
  store_global(a.out + i, load_global<uint32_t>(a.in + i) + (same ? 0 : 1));
}

// ---- E5: one warpgroup gives registers to three, in two steps ----

template <Fault kFault>
void given(const Arguments a) {
  const uint32_t i = thread_index();
  if (i < 128) {
    give_registers<64>();
    if (kFault != kNoBarrier) named_barrier_wait(1, 128);
  }
  if (kFault == kTwoNumbers && i < 32)
    give_registers<24>();
  else if (kFault == kTwoPlaces && i < 32)
    give_registers<32>();
  else if (i < 128)
    give_registers<kFault == kTooManyRegisters ? 40 : 32>();
  else
    take_registers<kFault == kOddRegisters ? 156 : 160>();
  if (i < kThreads) store_global(a.out + i, load_global<uint32_t>(a.in + i));
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

int main() {
  run("E1-right", boxed, {1, kThreads, 4096});
  run("E1-base-before-the-tensor", boxed, {1, kThreads, 4096, 100});
  run("E2-right", multiplied<kNone>);
  run("E2-result-written-in-flight", multiplied<kResultWritten>);
  run("E2-operand-written-in-flight", overwritten);
  run("E3-right", multiplied_once<kNone>);
  run("E3-registers-written-after-the-fence", multiplied<kLateRegisters>);
  run("E3-first-result-written-after-the-fence", multiplied_once<kLateResult>);
  run("E3-first-operand-written-after-the-fence", multiplied_once<kLateOperand>);
  run("E3-another-shape-in-flight", widened);
  run("E4-one-warp-with-another-descriptor", multiplied<kOtherDescriptor>);
  run("E4-a-warp-without-its-product", multiplied<kLostWarp>);
  run("E4-one-lane-with-another-scale", multiplied_once<kOtherScale>);
  run("E4-one-warp-at-another-place", multiplied<kOtherPlace>);
  run("E4-a-descriptor-within-its-swizzle", multiplied<kWithinSwizzle>);
  run("E5-right", given<kNone>, {1, 512});
  run("E5-more-registers-than-there-are", given<kTooManyRegisters>, {1, 512});
  run("E5-no-multiple-of-8", given<kOddRegisters>, {1, 512});
  run("E5-two-numbers-in-a-warpgroup", given<kTwoNumbers>, {1, 512});
  run("E5-two-places-in-a-warpgroup", given<kTwoPlaces>, {1, 512});
  run("E5-twice-without-a-barrier", given<kNoBarrier>, {1, 512});
  run("E7-right", copied, {1, 1024, 227 << 10});
  run("E7-threads", copied, {1, 1056, 8192});
  run("E7-shared-memory", copied, {1, kThreads, (227 << 10) + 1});
  run("E7-parameters", copied_large);
}
