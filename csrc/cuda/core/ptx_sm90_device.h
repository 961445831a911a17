// Bodies of csrc/cuda/core/ptx_sm90.h under nvcc. Numbers of sections are those of the PTX ISA 8.
#pragma once

#include <cuda.h>

namespace vdcore::cuda {

using TensorMap = CUtensorMap;

// ---- mbarrier (9.7.13.15) ----

VDCORE_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the accelerator; before a barrier of the whole block.
VDCORE_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

VDCORE_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// At the same barrier of the block with this rank.
VDCORE_DEVICE void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Arrives, and lets the phase wait for so many more bytes.
VDCORE_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase with this parity has completed. A fresh barrier counts as if a phase of parity 1 had.
VDCORE_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "TRY:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 10000000;\n"  // ns that a thread may be suspended for
      "@done bra DONE;\n"
      "bra TRY;\n"
      "DONE:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- Tensor memory accelerator (9.7.9.27) ----

VDCORE_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box at these coordinates, innermost first, to shared memory, 0 where it leaves the tensor, and then counts
// all its bytes at the barrier. `policy`: of L2.
VDCORE_DEVICE void load_box(void* shared, const TensorMap* map, uint64_t* barrier, uint64_t policy, int32_t c0,
                            int32_t c1, int32_t c2, int32_t c3, int32_t c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, "
      "%4, %5, %6}], [%7], %8;" ::"r"(shared_address(shared)),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// The same, to the same place of both blocks of a cluster, and counted at the barrier of each.
VDCORE_DEVICE void load_box_for_both(void* shared, const TensorMap* map, uint64_t* barrier, uint64_t policy, int32_t c0,
                                     int32_t c1, int32_t c2, int32_t c3, int32_t c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8, %9;" ::"r"(shared_address(shared)),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(shared_address(barrier)), "h"(uint16_t{3}), "l"(policy)
      : "memory");
}

// ---- Clusters (9.7.13.4) ----

VDCORE_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster meet.
VDCORE_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}

// ---- Warpgroups ----

template <int kRegisters>
VDCORE_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
VDCORE_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Named barriers (9.7.13.1); 0 is that of __syncthreads. `threads` counts those that wait and those that only arrive.
VDCORE_DEVICE void named_barrier_wait(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

VDCORE_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- wgmma (9.7.15) ----

// Orders registers that were written by ordinary instructions before the products that use them.
VDCORE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

VDCORE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// No instruction that touches these registers moves over this one. What a wait is for must be named so behind it, and
// what products take before them: to the compiler they are ordinary registers all along.
template <int N>
VDCORE_DEVICE void fence_operands(float (&x)[N]) {
  VDCORE_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int M, int N>
VDCORE_DEVICE void fence_operands(uint32_t (&x)[M][N]) {
  VDCORE_UNROLL
  for (int i = 0; i < M * N; ++i) asm volatile("" : "+r"(x[i / N][i % N])::"memory");
}

// Until at most so many of the latest groups are still running.
template <int kGroups>
VDCORE_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Keeps the wait that follows behind the computation of x, which is never below 0: ptxas moves a wait up as far as the
// next access to memory, and what was to run beside the products would then run after them. This is an access that
// depends on x and never happens.
VDCORE_DEVICE void after_computing(float x, const void* shared) {
  asm volatile("{.reg .pred never; setp.lt.f32 never, %0, 0f00000000; @never st.shared.b32 [%1], 0;}" ::"f"(x),
               "r"(shared_address(shared))
               : "memory");
}

VDCORE_DEVICE uint32_t shuffle_xor(uint32_t x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// What all lanes agree on, in a register of the warp.
VDCORE_DEVICE int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

}  // namespace vdcore::cuda

#include "cuda/core/wgmma_device.h"
