// Bodies of csrc/cuda/core/ptx_sm90.h on the CPU.
#pragma once

#include "emulator/emulator_sm90.h"

namespace vdcore::cuda {

VDCORE_DEVICE uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

VDCORE_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { emulator::mbarrier_init(barrier, arrivals); }
VDCORE_DEVICE void mbarrier_init_fence() { emulator::mbarrier_init_fence(); }
VDCORE_DEVICE void mbarrier_arrive(uint64_t* barrier) { emulator::mbarrier_arrive(barrier, 0); }
VDCORE_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  emulator::mbarrier_arrive(barrier, bytes);
}
VDCORE_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulator::mbarrier_wait(barrier, parity); }

VDCORE_DEVICE void prefetch_map(const TensorMap*) {}
VDCORE_DEVICE void load_box(void* shared, const TensorMap* map, uint64_t* barrier, uint64_t, int32_t c0, int32_t c1,
                            int32_t c2, int32_t c3, int32_t c4) {
  emulator::load_box(shared, map, barrier, {c0, c1, c2, c3, c4}, false);
}
VDCORE_DEVICE void load_box_for_both(void* shared, const TensorMap* map, uint64_t* barrier, uint64_t, int32_t c0,
                                     int32_t c1, int32_t c2, int32_t c3, int32_t c4) {
  emulator::load_box(shared, map, barrier, {c0, c1, c2, c3, c4}, true);
}
VDCORE_DEVICE uint32_t cluster_rank() { return emulator::position().rank; }
VDCORE_DEVICE void sync_cluster() { emulator::meet_cluster(); }
VDCORE_DEVICE void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) { emulator::mbarrier_arrive_at(barrier, rank); }

template <int kRegisters>
VDCORE_DEVICE void take_registers(VDCORE_SITE) {
  emulator::take_registers(kRegisters, {file, line});
}
template <int kRegisters>
VDCORE_DEVICE void give_registers(VDCORE_SITE) {
  emulator::give_registers(kRegisters, {file, line});
}

VDCORE_DEVICE void named_barrier_wait(int id, int threads, VDCORE_SITE) {
  emulator::meet_block(id, threads, {file, line});
}
VDCORE_DEVICE void named_barrier_arrive(int id, int threads, VDCORE_SITE) {
  emulator::arrive_block(id, threads, {file, line});
}

VDCORE_DEVICE void wgmma_fence(VDCORE_SITE) { emulator::wgmma_fence({file, line}); }
VDCORE_DEVICE void wgmma_commit(VDCORE_SITE) { emulator::wgmma_commit({file, line}); }
template <int kGroups>
VDCORE_DEVICE void wgmma_wait(VDCORE_SITE) {
  emulator::wgmma_wait(kGroups, {file, line});
}

template <typename E, int N>
struct Wgmma {
  template <bool kAdd>
  static void rows_times_rows(float (&d)[N / 2], uint64_t a, uint64_t b, VDCORE_SITE) {
    emulator::wgmma({E::dtype, N, d, nullptr, a, b, false, kAdd, {file, line}});
  }
  static void registers_times_columns(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, VDCORE_SITE) {
    emulator::wgmma({E::dtype, N, d, a, 0, b, true, true, {file, line}});
  }
};

template <int N>
VDCORE_DEVICE void fence_operands(float (&)[N]) {}
template <int M, int N>
VDCORE_DEVICE void fence_operands(uint32_t (&)[M][N]) {}
VDCORE_DEVICE void after_computing(float, const void*) {}

VDCORE_DEVICE uint32_t shuffle_xor(uint32_t x, int lanes) {
  return emulated::meet(emulated::shfl_xor, x, lanes, "shfl");
}
VDCORE_DEVICE int warp_uniform(int x) {
  return static_cast<int>(emulated::meet(emulated::shfl_first, static_cast<uint32_t>(x), 0, "shfl"));
}

}  // namespace vdcore::cuda
