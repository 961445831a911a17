// What rules.cpp and ordering.cpp share: kernels that keep or break the rules of tests/emulator/emulator.h, run in
// every order of warps.
#pragma once

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

struct Arguments {
  const uint32_t* in;
  uint32_t* out;
  TensorMap map;
  int32_t first;  // row of the map that the box begins at
};

inline TensorMap map_of(const void* base) {
  TensorMap map{};
  map.base = static_cast<const char*>(base);
  const int64_t size[5] = {64, 1000, 1, 1, 1}, stride[5] = {2, 128, 16, 16, 16};
  std::memcpy(map.size, size, sizeof size);
  std::memcpy(map.stride, stride, sizeof stride);
  map.box[0] = 64, map.box[1] = 8;
  return map;
}

struct Launch {
  int64_t blocks = 1;
  int threads = kThreads;
  size_t shared = 8192;
  int shift = 0;  // rows that the map's base lies before its tensor
  int cluster = 1;
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
      launch({name}, kernel, {how.blocks, how.threads, how.shared, how.cluster}, parameters);
      bool right = true;
      for (uint32_t i = 0; i < kThreads; ++i) right = right && out[i] == 1000 + (boxes ? i % 8 * 32 : i);
      std::printf("%s %s %s\n", name, order.name, right ? "right" : "wrong");
    } catch (const std::exception& error) {
      std::printf("%s %s %s\n", name, order.name, error.what());
    }
    emulator::expose_nothing();
  }
}
