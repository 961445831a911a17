// Runs a kernel of temporal attention or of norm and rope, as it is or as a test has changed it, in every order of
// warps, and prints for each a hash of its results, or what the emulator objects to. KERNEL: temporal backward, 0
// short, 1 short with norm and rope, 2 long with them and shared keys; 3 temporal forward with norm and rope; 4 norm
// and rope of rows, backward, pairs in halves.
#define VDCORE_EMULATE
#include <cstdio>
#include <vector>

#if KERNEL == 4
#include "cuda/qk_norm_rope/qk_norm_rope.cu"
#else
#include "cuda/temporal_attention/backward.cuh"
#include "cuda/temporal_attention/backward_long.cuh"
#include "cuda/temporal_attention/forward.cuh"
#endif
#include "cuda/temporal_attention/temporal_attention.h"

using namespace vdcore;
using namespace vdcore::cuda;

int main() {
  constexpr int T = KERNEL == 2 ? 37 : 27, S = 3, H = 2, G = KERNEL == 2 ? 1 : 2, D = 40, kCount = T * S * H * D;
  std::vector<std::vector<uint16_t>> memory;
  uint32_t state = 1;
  const auto draw = [&] {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / (1 << 23) - 1;
  };
  for (int i = 0; i < 8; ++i) {
    memory.emplace_back(kCount + 8);
    for (uint16_t& x : memory.back()) x = static_cast<uint16_t>(pack<bf16>(draw(), 0));
  }
  std::vector<std::vector<float>> numbers(4, std::vector<float>(T * S * H * D / 2 + 4));
  for (auto& row : numbers)
    for (float& x : row) x = draw();
  const auto aligned = [](auto& x) { return (reinterpret_cast<uintptr_t>(x.data()) + 15) & ~uintptr_t{15}; };
  const auto tokens = [&](int i, int heads) {
    return Tokens{reinterpret_cast<char*>(aligned(memory[i])), 2 * T * S * heads * D, 2 * S * heads * D, 2 * heads * D,
                  2 * D};
  };
  const auto floats = [&](int i) { return reinterpret_cast<float*>(aligned(numbers[i])); };
  TemporalAttentionBackward args{};
  TemporalAttention& a = args.forward;
  a.q = tokens(0, H), a.k = tokens(1, G), a.v = tokens(2, G), args.dout = tokens(3, H), a.out = tokens(7, H);
  args.dq = tokens(4, H), args.dk = tokens(5, G), args.dv = tokens(6, G);
  a.frames = Frames(WindowMask{4, 0, 1, 1}, 0, nullptr, T, T, true);
  a.sequences = S * H, a.positions = S, a.heads = H, a.groups = G, a.head_dim = D, a.scale = 0.2f;
  a.lse = floats(0);
  std::vector<float> sums(S * H * 4 * D, 0.f);
  if (KERNEL > 0) {
    constexpr bool kLayer = KERNEL == 2 || KERNEL == 4;
    a.norm_rope.kind = kLayer ? NormKind::layer : NormKind::rms, a.norm_rope.eps = 1e-5f;
    a.norm_rope.q = {floats(1), kLayer ? floats(2) : nullptr},
    a.norm_rope.k = {floats(2), kLayer ? floats(1) : nullptr};
    a.norm_rope.style = KERNEL == 4 ? RopeStyle::half : RopeStyle::interleaved;
    a.norm_rope.cos = floats(2), a.norm_rope.sin = floats(3);
    a.norm_rope.table_t = a.norm_rope.pairs = KERNEL == 4 ? 16 : D / 2;
    args.sums = sums.data();
  }
  for (int run = 0; run < 4; ++run) {
    using emulator::Order;
    emulator::set_order(run == 0 ? Order::forward : run == 1 ? Order::backward : Order::random, run);
    try {
#if KERNEL == 2
      const size_t bytes = long_backward_shared_bytes(T, T, D, H / G);
      launch({"temporal_attention"}, temporal_long_backward_kernel<bf16, 2>, {S, 32 * 3, bytes},
             TemporalLongBackward{args, tiles_of(T), tiles_of(T), 3, Sequences(G, S)});
#elif KERNEL == 3
      launch_temporal<temporal_forward_kernel<bf16, 4, 2, Fused::rms>>({"temporal_attention"},
                                                                       TemporalForward({"temporal_attention"}, a),
                                                                       kTemporalThreads / 32 * staged_bytes(4, 2));
#elif KERNEL == 4
      const RowsNormRope rows{a.q, args.dout, T * S * H, 0, T, S, H, D, a.norm_rope.q, a.norm_rope};
      rows_norm_rope_backward({"qk_norm_rope"}, DType::bf16, {rows, args.dq, false, args.sums});
#else
      temporal_backward_kernel_of<bf16, 4, 2, KERNEL ? Fused::rms : Fused::none>({"temporal_attention"},
                                                                                 TemporalBackward(args));
#endif
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
      continue;
    }
    uint64_t hash = 1469598103934665603u;
    const auto add = [&](const void* data, size_t bytes) {
      for (size_t j = 0; j < bytes; ++j) hash = (hash ^ static_cast<const uint8_t*>(data)[j]) * 1099511628211u;
    };
    add(args.dq.data, 2 * kCount), add(a.out.data, 2 * kCount);
    add(args.dk.data, 2 * T * S * G * D), add(args.dv.data, 2 * T * S * G * D);
    add(sums.data(), sums.size() * sizeof(float));
    std::printf("%016llx\n", static_cast<unsigned long long>(hash));
  }
}
