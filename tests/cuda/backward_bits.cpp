// Runs the backward kernel of temporal attention, as it is or as a test has changed it, in every order of warps, and
// prints a hash of its results for each.
#define VDCORE_EMULATE
#include <cstdio>
#include <vector>

#include "cuda/temporal_attention_backward.cuh"

using namespace vdcore;
using namespace vdcore::cuda;

int main() {
  constexpr int T = 27, S = 3, H = 2, D = 40, kCount = T * S * H * D;
  std::vector<std::vector<uint16_t>> memory;
  uint32_t state = 1;
  for (int i = 0; i < 7; ++i) {
    memory.emplace_back(kCount + 8);
    for (uint16_t& x : memory.back()) {
      state = state * 1664525u + 1013904223u;
      x = static_cast<uint16_t>(pack<bf16>(static_cast<float>(state >> 8) / (1 << 23) - 1, 0));
    }
  }
  const auto tokens = [&](int i) {
    const auto start = (reinterpret_cast<uintptr_t>(memory[i].data()) + 15) & ~uintptr_t{15};
    return Tokens{reinterpret_cast<char*>(start), 2 * kCount, 2 * S * H * D, 2 * H * D, 2 * D};
  };
  TemporalAttentionBackward args{};
  TemporalAttention& a = args.forward;
  a.q = tokens(0), a.k = tokens(1), a.v = tokens(2), args.dout = tokens(3);
  args.dq = tokens(4), args.dk = tokens(5), args.dv = tokens(6);
  a.frames = {FrameMask{4, 0, 1, 1}, 0, nullptr, T, T, true};
  a.lines = S * H, a.positions = S, a.heads = a.groups = H, a.head_dim = D, a.scale = 0.2f;
  for (int run = 0; run < 4; ++run) {
    using emulator::Order;
    emulator::set_order(run == 0 ? Order::forward : run == 1 ? Order::backward : Order::random, run);
    temporal_backward<bf16, 4, 2>({"temporal_attention"}, {args, a.lines, false});
    uint64_t hash = 1469598103934665603u;
    for (int i = 4; i < 7; ++i)
      for (int j = 0; j < 2 * kCount; ++j) hash = (hash ^ static_cast<uint8_t>(tokens(i).data[j])) * 1099511628211u;
    std::printf("%016llx\n", static_cast<unsigned long long>(hash));
  }
}
