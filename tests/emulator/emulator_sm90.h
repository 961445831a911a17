// The asynchronous engines of sm_90a under the emulator: mbarrier, tensor maps, wgmma.
//
// Copies of the accelerator and products run on their own: each lands at once or only when it is waited for, as the
// order of the test chooses, so that a tile that is overwritten, read or released too early gives wrong numbers. Until
// a product has been waited for its result holds NaN.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"
#include "emulator/emulator.h"

namespace vdcore::cuda {

// What cuTensorMapEncodeTiled would be told, for elements of two bytes and a swizzle as wide as a row of the box.
struct alignas(64) TensorMap {
  const char* base;
  int64_t size[5], stride[5];  // stride in bytes
  int32_t box[2];
};

namespace emulator {

uint32_t shared_address(const void* p);

void mbarrier_init(uint64_t* barrier, uint32_t arrivals);
// fence.mbarrier_init and fence.proxy.async; the latter alone.
void mbarrier_init_fence();
void fence_proxy_async();
void mbarrier_arrive(uint64_t* barrier, uint32_t bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank);
// `for_both`: to the same place of every block of the cluster.
void load_box(void* shared, const TensorMap* map, uint64_t* barrier, const int32_t (&at)[5], bool for_both);

void wgmma_fence(const Site& site);
// d (64 x n) = A B, or with `add` d += A B: A in shared memory, or in registers where `a` is not null; the rows of B in
// shared memory are the columns of the product or, with `columns`, its K.
struct Operands {
  DType type;
  int n;
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool columns, add;
  Site site;
};
void wgmma(const Operands& mine);
void wgmma_commit(const Site& site);
void wgmma_wait(int groups_left, const Site& site);

// setmaxnreg.inc and .dec: registers of each thread from now on.
void take_registers(int registers, const Site& site);
void give_registers(int registers, const Site& site);

}  // namespace emulator
}  // namespace vdcore::cuda
