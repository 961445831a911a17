// Kernels that are right and kernels that are wrong in one place, for the emulator to tell apart. Prints a line a
// kernel and order: its name, the order, and "right", "wrong" or what the emulator objects to.
#define VDCORE_EMULATE
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/core/launch.h"
#include "cuda/core/ptx_sm90.h"

using namespace vdcore;
using namespace vdcore::cuda;

struct Arguments {
  const uint32_t* in;
  uint32_t* out;
};

constexpr int kThreads = 128;

enum Fault { kNone, kNoBarrier, kNoWarpBarrier, kHalfWarp, kLostWarp, kBeyond, kRow, kHalfWarps };

// Every thread hands its value to the thread at the other end of the block.
template <Fault kFault>
void through_shared_memory(const Arguments a) {
  auto* const cells = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t i = thread_index();
  store_shared(cells + i, load_global<uint32_t>(a.in + i + (kFault == kBeyond && i == 127)));
  if (kFault == kLostWarp && i >= 96) return;
  if (kFault != kNoBarrier) sync_block();
  store_global(a.out + i, load_shared<uint32_t>(cells + 127 - i));
}

// The same among the lanes of a warp.
template <Fault kFault>
void through_a_warp(const Arguments a) {
  auto* const cells = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t i = thread_index(), warp = i / 32 * 32;
  store_shared(cells + i, load_global<uint32_t>(a.in + i));
  if (kFault != kNoWarpBarrier) sync_warp();
  const uint32_t x = load_shared<uint32_t>(cells + warp + 31 - i % 32);
  if (kFault == kHalfWarp && i % 32 >= 16) return store_global(a.out + i, x);
  store_global(a.out + i, ballot(true) ? x : 0);
}

// c = a b with a of 16 x 16 and b of 16 x 8 from shared memory: against a product taken element by element.
template <Fault kFault>
void product(const Arguments a) {
  auto* const cells = reinterpret_cast<uint16_t*>(shared_memory());
  const uint32_t i = thread_index(), lane = i % 32;
  if (i < 32)
    for (uint32_t x = lane; x < 384; x += 32) cells[x] = static_cast<uint16_t>(pack<bf16>(float(x * 7 % 31) - 15, 0));
  sync_block();
  const auto pair = [&](uint32_t at) { return load_shared<uint32_t>(cells + at + lane % 4 * 2); };
  uint32_t left[4], right[2];
  for (uint32_t m = 0; m < 4; ++m) left[m] = pair((lane / 4 + m % 2 * 8) * 16 + m / 2 * 8);
  for (uint32_t m = 0; m < 2; ++m) right[m] = transpose8x8(pair(256 + (lane / 4 + m * 8) * 8));  // b: [k][column]
  if (kFault == kRow) std::swap(left[1], left[2]);
  float c[4] = {};
  mma<bf16>(c, left, right[0], right[1]);
  bool same = true;
  for (int e = 0; e < 4; ++e) {
    const uint32_t row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    float sum = 0;
    for (uint32_t k = 0; k < 16; ++k)
      sum += unpack<bf16>(cells[row * 16 + k]).lo * unpack<bf16>(cells[256 + k * 8 + column]).lo;
    same &= sum == c[e];
  }
  store_global(a.out + i, load_global<uint32_t>(a.in + 127 - i) + (same ? 0 : 1));
}

// What lanes are to agree on: their warp, or which half of it they are in.
template <Fault kFault>
void agreed(const Arguments a) {
  const uint32_t i = thread_index(), number = i / (kFault == kHalfWarps ? 16 : 32);
  const bool same = warp_uniform(static_cast<int>(number)) == static_cast<int>(number) &&
                    shuffle_xor(number, kFault == kBeyond ? 32 : 16) == number;
  store_global(a.out + i, load_global<uint32_t>(a.in + i) + (same ? 0 : 1));
}

void run(const char* name, void (*kernel)(Arguments), bool (*expected)(const std::vector<uint32_t>&)) {
  const struct {
    const char* name;
    emulator::Order order;
    uint64_t seed;
  } orders[] = {{"forward", emulator::Order::forward, 0},
                {"backward", emulator::Order::backward, 0},
                {"random", emulator::Order::random, 1}};
  for (const auto& order : orders) {
    std::vector<uint32_t> in(kThreads), out(kThreads, 0xdead);
    for (int i = 0; i < kThreads; ++i) in[i] = 1000 + i;
    emulator::set_order(order.order, order.seed);
    emulator::expose(in.data(), in.data() + in.size());
    emulator::expose(out.data(), out.data() + out.size());
    try {
      launch({name}, kernel, {1, kThreads, 8192}, Arguments{in.data(), out.data()});
      std::printf("%s %s %s\n", name, order.name, expected(out) ? "right" : "wrong");
    } catch (const std::exception& error) {
      std::printf("%s %s %s\n", name, order.name, error.what());
    }
    emulator::expose_nothing();
  }
}

int main() {
  const auto reversed = [](const std::vector<uint32_t>& out) {
    for (uint32_t i = 0; i < kThreads; ++i)
      if (out[i] != 1000 + 127 - i) return false;
    return true;
  };
  const auto straight = [](const std::vector<uint32_t>& out) {
    for (uint32_t i = 0; i < kThreads; ++i)
      if (out[i] != 1000 + i) return false;
    return true;
  };
  const auto reversed_in_warps = [](const std::vector<uint32_t>& out) {
    for (uint32_t i = 0; i < kThreads; ++i)
      if (out[i] != 1000 + i / 32 * 32 + 31 - i % 32) return false;
    return true;
  };
  run("shared", through_shared_memory<kNone>, reversed);
  run("shared-no-barrier", through_shared_memory<kNoBarrier>, reversed);
  run("shared-lost-warp", through_shared_memory<kLostWarp>, reversed);
  run("shared-beyond", through_shared_memory<kBeyond>, reversed);
  run("warp", through_a_warp<kNone>, reversed_in_warps);
  run("warp-no-barrier", through_a_warp<kNoWarpBarrier>, reversed_in_warps);
  run("warp-half", through_a_warp<kHalfWarp>, reversed_in_warps);
  run("agreed", agreed<kNone>, straight);
  run("agreed-by-halves", agreed<kHalfWarps>, straight);
  run("agreed-beyond", agreed<kBeyond>, straight);
  run("product", product<kNone>, reversed);
  run("product-rows-swapped", product<kRow>, reversed);
}
