// Runs the Hopper kernel of frame attention under the emulator in several orders, in blocks and clusters of two, with
// and without a gate, on tiles small enough for a test, and compares with plain sums. Exits with 0 where all is right,
// 1 for wrong numbers, 2 for what the emulator objects to. tests/build/test_hopper.py compiles it against the kernel as
// it is and with one line of it wrong.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda/core/tensor_map.h"
#include "cuda/frame_attention/forward_sm90.cuh"
#include "emulator/emulator.h"

using namespace vdcore;
using namespace vdcore::cuda;

namespace {

using Plan = FramePlan<80, 2, 48, 2, 2>;
constexpr int kFrames = 3, kTokens = 107, kHeads = 1, kChannels = 72, kRow = kHeads * kChannels;
constexpr int64_t kAll = kFrames * kTokens;
constexpr int64_t kGap = 32 << 10;  // elements before each tensor that are none of the call's

std::vector<uint16_t> random_rows(uint32_t& state) {
  std::vector<uint16_t> x(kGap + kAll * kRow);
  for (int64_t i = kGap; i < static_cast<int64_t>(x.size()); ++i) {
    float sum = 0;
    for (int j = 0; j < 4; ++j)
      sum += static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1;
    x[i] = static_cast<uint16_t>(pack<bf16>(sum, 0));
  }
  return x;
}

float value(const std::vector<uint16_t>& x, int64_t row, int channel) {
  return unpack<bf16>(x[kGap + row * kRow + channel]).lo;
}

// Dense attention over all frames.
std::vector<double> expected(const std::vector<uint16_t>& q, const std::vector<uint16_t>& k,
                             const std::vector<uint16_t>& v) {
  std::vector<double> out(kAll * kRow), p(kAll);
  for (int64_t i = 0; i < kAll; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < kAll; ++j) {
      double score = 0;
      for (int c = 0; c < kChannels; ++c) score += double{value(q, i, c)} * value(k, j, c);
      sum += p[j] = std::exp2(score * 0.125);
    }
    for (int64_t j = 0; j < kAll; ++j)
      for (int c = 0; c < kChannels; ++c) out[i * kRow + c] += p[j] / sum * value(v, j, c);
  }
  return out;
}

TensorMap map_of(const Where& where, const std::vector<uint16_t>& x, bool windows, int32_t columns, int32_t rows) {
  const char* base = reinterpret_cast<const char*>(x.data() + kGap);
  if (!windows)
    return make_tensor_map(where, {DType::bf16, base, {kChannels, kAll, 1, 1, 1}, {1, kRow, 8, 8, 8}, columns, rows});
  return make_tensor_map(
      where, {DType::bf16, base, {kChannels, Plan::kKeys, kAll, 1, 1}, {1, kRow, kRow, 8, 8}, columns, rows});
}

}  // namespace

int main() {
  uint32_t state = 7;
  const auto q = random_rows(state), k = random_rows(state), v = random_rows(state);
  const auto right = expected(q, k, v);
  const Where where{"frame_attention"};
  FrameParameters p{};
  p.video = {map_of(where, q, false, 64, Plan::kRows), map_of(where, k, true, 64, Plan::kBoxRows),
             map_of(where, v, true, Plan::kValueColumn, Plan::kBoxRows), 0, 0};
  p.tiles.mask = WindowMask{};
  p.tiles.queries = p.tiles.keys = p.tiles.group = kFrames;
  p.tiles.tokens = kTokens;
  p.tiles.rows = Plan::kRows;
  p.rows = kAll;
  p.heads = p.ratio = kHeads;
  p.channels = kChannels;
  p.exponent = 0.125f;
  using emulator::Order;
  const uint16_t half = static_cast<uint16_t>(pack<bf16>(0.5f, 0)), one = static_cast<uint16_t>(pack<bf16>(1, 0));
  const Order orders[] = {Order::forward, Order::backward, Order::random, Order::random, Order::random, Order::random};
  uint64_t seed = 0;
  for (int i = 0; i < 12; ++i) {
    const Order order = orders[i / 2];
    p.cluster = p.tiles.side = 1 + i % 2;
    p.items = p.tiles.count() / p.cluster;
    p.blocks = p.cluster;                         // which take one tile after the other, or one pair of tiles
    const bool gated = i % 4 == 1 || i % 4 == 2;  // a half of the result, and one of what was there: ones
    alignas(16) static uint16_t out[kAll * kRow];
    std::fill(std::begin(out), std::end(out), one);
    p.out = reinterpret_cast<char*>(out);
    p.gate = {};
    if (gated) p.gate.data = reinterpret_cast<const char*>(&half);
    emulator::set_order(order, ++seed);
    emulator::expose_nothing();
    for (const auto* x : {&q, &k, &v}) emulator::expose(x->data() + kGap, x->data() + x->size());
    emulator::expose(std::begin(out), std::end(out));
    emulator::expose(&half, &half + 1);
    try {
      launch(where, frame_attention_sm90_fwd_kernel<Plan, bf16>, {p.blocks, Plan::kThreads, Plan::kShared, p.cluster},
             p);
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
      return 2;
    }
    double worst = 0;
    for (int64_t i = 0; i < kAll * kRow; ++i) {
      const double error = std::fabs(unpack<bf16>(out[i]).lo - (gated ? (right[i] + 1) / 2 : right[i]));
      worst = error <= worst ? worst : error;  // NaN too
    }
    if (!(worst < 0.03)) {
      std::printf("wrong by %g in order %d, in clusters of %d\n", worst, static_cast<int>(order), p.cluster);
      return 1;
    }
  }
  return 0;
}
