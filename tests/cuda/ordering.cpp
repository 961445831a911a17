// Kernels that keep the rules E6 and E8 to E10 of tests/emulator/emulator.h, of who meets and whose memory is whose,
// and for each rule kernels that break it and still give right numbers. Prints what rules.cpp does.
#include "rules.h"

enum Fault {
  kNone,
  kHalfWarps,  // E6
  kTwoPlaces,
  kTwoProducts,
  kTwice,
  kBarrier16,
  kBarrierOfForty,
  kNoProxyFence,  // E8
  kNoProxyFenceOfBox,
  kNoInitFence,
  kInitialisedAgain,
  kOfNobody,
  kManyBytes,
  kBytesOfNoBox,
  kNotAwaited,
  kOnABarrier,
  kTwoBlocks,  // E9
  kTwoThreads,
  kConstantLoad,
  kConstantLoadBefore,
  kBoxBefore,
  kOtherBarrier,  // E10
  kNoBarrier,
  kMbarrier,
  kBlockReadsLater,
  kBlockReadsBefore,
  kVote,
  kOneLaneWaits,
  kBehindTheArrival,
  kOneLaneArrives
};

VDCORE_DEVICE uint32_t* cells() { return reinterpret_cast<uint32_t*>(shared_memory()); }

// ---- E6: barriers ----

template <Fault kFault>
void met(const Arguments a) {
  const uint32_t i = thread_index();
  store_shared(cells() + i, load_global<uint32_t>(a.in + i));
  sync_block();
  if (kFault == kHalfWarps && i % 32 < 16) named_barrier_wait(1, 64);
  if (kFault == kTwoPlaces) {
    if (i % 32 < 16)
      named_barrier_wait(1, kThreads);
    else
      named_barrier_wait(1, kThreads);
  }
  if (kFault == kTwoProducts) {
    float c[4] = {};
    const uint32_t zeros[4] = {};
    if (i % 32 < 16)
      mma<bf16>(c, zeros, 0, 0);
    else
      mma<bf16>(c, zeros, 0, 0);
  }
  if (kFault == kTwice && i < 32) {
    named_barrier_arrive(1, 64);
    named_barrier_wait(1, 64);
  }
  if (kFault == kBarrier16) named_barrier_wait(16, kThreads);
  if (kFault == kBarrierOfForty && i < 40) named_barrier_wait(1, 40);
  if (kFault == kNone) named_barrier_wait(15, kThreads);
  store_global(a.out + i, load_shared<uint32_t>(cells() + i));
}

// ---- E8: what threads write, and what then reads or writes it on its own; mbarriers ----

template <Fault kFault>
void multiplied(const Arguments a) {
  const uint32_t i = thread_index();
  for (uint32_t x = i; x < 2048; x += kThreads) store_shared(cells() + x, kOnes);
  if (kFault != kNoProxyFence) emulator::fence_proxy_async();
  sync_block();
  float d[4] = {};
  uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
  wgmma_fence();
  Wgmma<bf16, 8>::registers_times_columns(d, ones, columns_descriptor<64>(0, 2048));
  wgmma_commit();
  wgmma_wait<0>();
  store_global(a.out + i, load_global<uint32_t>(a.in + i) + (d[0] == 16 ? 0 : 1));
}

// A box of 8 rows of 64 elements over what threads have written; E9: of what they write behind it, or with its first
// row read by all lanes where only one has waited, or one has told that all are done, or the number of the round stored
// after the arrival: E10.
template <Fault kFault>
void boxed(const Arguments a) {
  char* const tile = shared_memory();
  auto* const full = reinterpret_cast<uint64_t*>(shared_memory() + 2048);
  uint64_t *const empty = full + 1, *const idle = kFault == kOnABarrier ? full - 192 : full + 2;
  const uint32_t i = thread_index();
  store_shared(cells() + i, i);
  if (kFault != kNoProxyFenceOfBox) emulator::fence_proxy_async();
  if (i == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, kThreads / 32);
    mbarrier_init(idle, kFault == kOfNobody ? 0 : 1);
    if (kFault == kInitialisedAgain) mbarrier_init(idle, 1);
    if (kFault != kNoInitFence) mbarrier_init_fence();
  }
  sync_block();
  if (i == 0 && (kFault == kManyBytes || kFault == kBytesOfNoBox || kFault == kNotAwaited)) {
    mbarrier_arrive_expect(idle, kFault == kManyBytes ? 1 << 20 : 1024);
    if (kFault == kNotAwaited) load_box(tile + 1024, &a.map, idle, kReadOnce, 0, a.first, 0, 0, 0);
  }
  uint32_t* const round = cells() + 1000;
  uint32_t sum = 0;
  for (uint32_t parity = 0; parity < 2; ++parity) {
    if (i == 0) {
      if (parity) mbarrier_wait(empty, 0);
      if (kFault == kNone) store_shared(round, parity);
      mbarrier_arrive_expect(full, 1024);
      if (kFault == kBehindTheArrival) store_shared(round, parity);
      load_box(tile, &a.map, full, kReadOnce, 0, a.first, 0, 0, 0);
    }
    if (kFault != kOneLaneWaits || i % 32 == 0) mbarrier_wait(full, parity);
    if (kFault == kOneLaneWaits) ballot(true);
    sum += load_shared<uint32_t>(tile + 144 * (i % 8));  // the first piece of a row, swizzled
    if ((kFault == kNone || kFault == kBehindTheArrival) && load_shared<uint32_t>(round) != parity) return;
    if (kFault == kOneLaneArrives)
      ballot(true);
    else
      sync_warp();
    if (i % 32 == 0) mbarrier_arrive(empty);
  }
  sync_block();
  if (kFault == kBoxBefore && i == 0) store_global(const_cast<uint32_t*>(a.in), uint32_t{1000});
  store_global(a.out + i, sum / 2);
}

// ---- E9: who writes, and who reads it ----

template <Fault kFault>
void stored(const Arguments a) {
  const uint32_t i = thread_index();
  const uint32_t x = load_global<uint32_t>(a.in + i);
  if (kFault == kConstantLoadBefore && load_global<uint32_t>(a.out + 127 - i) != 0xdead) return;
  if (kFault == kConstantLoadBefore) sync_block();
  if (kFault == kTwoBlocks || block_index() == 0) store_global(a.out + i, x);
  if (block_index() != 0) return;
  if (kFault == kTwoThreads && i == 40) store_global(a.out, load_global<uint32_t>(a.in));
  sync_block();
  const uint32_t back =
      kFault == kConstantLoad ? load_global<uint32_t>(a.out + 127 - i) : load_written<uint32_t>(a.out + 127 - i);
  sync_block();
  store_global(a.out + 127 - i, back);
}

// ---- E10: what is in no order ----

// Two pairs of warps write the same words; each meets at a barrier of its own, which is none of the other's.
template <Fault kFault>
void paired(const Arguments a) {
  const uint32_t i = thread_index(), pair = i / 64;
  store_shared(cells() + 64 * (kFault == kOtherBarrier ? 0 : pair) + i % 64, 7 + i % 64);
  named_barrier_wait(1 + static_cast<int>(pair), 64);
  const uint32_t x = load_shared<uint32_t>(cells() + 64 * (kFault == kOtherBarrier ? 0 : pair) + 63 - i % 64);
  store_global(a.out + i, load_global<uint32_t>(a.in + i) + x - (70 - i % 64));
}

// Thread 64 and then 96 write one word of the result. Their warps meet others in between, not one another.
template <Fault kFault>
void in_turn(const Arguments a) {
  const uint32_t i = thread_index(), warp = i / 32, x = load_global<uint32_t>(a.in + i);
  if (i != 0) store_global(a.out + i, x);
  if (i == 64) store_global(a.out, uint32_t{1000});
  if (kFault == kNone)
    sync_block();
  else
    named_barrier_wait(warp == 0 || warp == 3 ? 1 : 2, 64);
  if (i == 96) store_global(a.out, uint32_t{1000});
}

// Words of shared memory that a thread writes and one of another warp looks at, too late for it to matter.
template <Fault kFault>
void looked_at(const Arguments a) {
  const uint32_t i = thread_index(), x = load_global<uint32_t>(a.in + i);
  if (i == 0) store_shared(cells(), x);
  if (kFault != kNoBarrier) sync_block();
  if (i == 127 && load_shared<uint32_t>(cells()) == 5) return;
  store_global(a.out + i, x);
}

// Every thread writes a byte, and reads another one's.
void bytes(const Arguments a) {
  const uint32_t i = thread_index();
  store_shared(shared_memory() + i, static_cast<uint8_t>(i));
  sync_block();
  const uint32_t other = load_shared<uint8_t>(shared_memory() + 127 - i);
  store_global(a.out + i, load_global<uint32_t>(a.in + i) + other + i - 127);
}

// Block 1 writes the result, and block 0 looks at it, or the other way round.
template <Fault kFault>
void watched(const Arguments a) {
  const uint32_t i = thread_index(), writer = kFault == kBlockReadsLater ? 0 : 1;
  if (block_index() == writer)
    store_global(a.out + i, load_global<uint32_t>(a.in + i));
  else if (kFault != kNone && load_written<uint32_t>(a.out + i) == 5)
    store_shared(cells(), 5);
}

// Lanes hand words to one another; a vote is no barrier.
template <Fault kFault>
void through_a_warp(const Arguments a) {
  const uint32_t i = thread_index();
  store_shared(cells() + i, load_global<uint32_t>(a.in + (i ^ 31)));
  if (kFault == kVote)
    ballot(true);
  else
    sync_warp();
  store_global(a.out + i, load_shared<uint32_t>(cells() + (i ^ 31)));
}

// Two halves of a block hand words to one another behind an mbarrier, which its threads need no fence to use.
void halved(const Arguments a) {
  auto* const there = reinterpret_cast<uint64_t*>(shared_memory() + 4096);
  const uint32_t i = thread_index();
  if (i == 0) mbarrier_init(there, kThreads);
  sync_block();
  store_shared(cells() + i, load_global<uint32_t>(a.in + (i ^ 64)));
  mbarrier_arrive(there);
  mbarrier_wait(there, 0);
  store_global(a.out + i, load_shared<uint32_t>(cells() + (i ^ 64)));
}

// A warp of each block of a cluster ends, and the others meet without it.
void left(const Arguments a) {
  const uint32_t i = thread_index();
  if (cluster_rank() == 0) store_global(a.out + i, load_global<uint32_t>(a.in + i));
  if (i < 32) return;
  sync_cluster();
  if (cluster_rank() == 1 && load_written<uint32_t>(a.out + i) == 5) store_shared(cells() + i, 5);
}

// Two blocks of a cluster tell one another to go on; then block 1 writes the result, and block 0 looks at it.
template <Fault kFault>
void clustered(const Arguments a) {
  auto* const turn = reinterpret_cast<uint64_t*>(shared_memory());
  const uint32_t i = thread_index(), rank = cluster_rank();
  if (i == 0) {
    mbarrier_init(turn, 1);
    mbarrier_init(turn + 1, 1);
    if (kFault != kNoInitFence) mbarrier_init_fence();
  }
  sync_cluster();
  if (i == 0) mbarrier_arrive_at(turn, rank ^ 1);
  mbarrier_wait(turn, 0);
  if (rank == 1) store_global(a.out + i, load_global<uint32_t>(a.in + i));
  if (kFault == kMbarrier) {
    sync_block();
    if (i == 0) mbarrier_arrive_at(turn + 1, rank ^ 1);
    mbarrier_wait(turn + 1, 0);
  } else if (kFault != kNoBarrier) {
    sync_cluster();
  }
  if (rank == 0 && load_written<uint32_t>(a.out + i) == 5) store_shared(cells() + 64 + i, 5);
  sync_cluster();
}

int main() {
  run("E6-right", met<kNone>);
  run("E6-some-end-right", left, {2, kThreads, 8192, 0, 2});
  run("E6-half-warps", met<kHalfWarps>);
  run("E6-two-places", met<kTwoPlaces>);
  run("E6-two-places-of-a-product", met<kTwoProducts>);
  run("E6-twice-in-a-phase", met<kTwice>);
  run("E6-barrier-16", met<kBarrier16>);
  run("E6-forty-threads", met<kBarrierOfForty>);
  run("E8-right", boxed<kNone>, {1, kThreads, 4096});
  run("E8-threads-right", halved);
  run("E8-no-fence-of-the-proxy", multiplied<kNoProxyFence>);
  run("E8-no-fence-of-the-proxy-before-a-box", boxed<kNoProxyFenceOfBox>, {1, kThreads, 4096});
  run("E8-no-fence-of-mbarriers", boxed<kNoInitFence>, {1, kThreads, 4096});
  run("E8-no-fence-of-mbarriers-of-a-cluster", clustered<kNoInitFence>, {2, kThreads, 8192, 0, 2});
  run("E8-mbarrier-initialised-again", boxed<kInitialisedAgain>, {1, kThreads, 4096});
  run("E8-mbarrier-of-nobody", boxed<kOfNobody>, {1, kThreads, 4096});
  run("E8-too-many-bytes", boxed<kManyBytes>, {1, kThreads, 4096});
  run("E8-bytes-of-no-box", boxed<kBytesOfNoBox>, {1, kThreads, 4096});
  run("E8-nobody-waits-for-a-box", boxed<kNotAwaited>, {1, kThreads, 4096});
  run("E8-box-on-an-mbarrier", boxed<kOnABarrier>, {1, kThreads, 4096});
  run("E9-right", stored<kNone>, {2});
  run("E9-two-blocks-write", stored<kTwoBlocks>, {2});
  run("E9-two-threads-write", stored<kTwoThreads>);
  run("E9-constant-load-of-what-is-written", stored<kConstantLoad>);
  run("E9-constant-load-before-the-store", stored<kConstantLoadBefore>);
  run("E9-box-before-the-store", boxed<kBoxBefore>, {1, kThreads, 4096});
  run("E10-right", paired<kNone>);
  run("E10-turns-right", in_turn<kNone>);
  run("E10-looks-right", looked_at<kNone>);
  run("E10-bytes-right", bytes);
  run("E10-blocks-right", watched<kNone>, {2});
  run("E10-cluster-right", clustered<kNone>, {2, kThreads, 8192, 0, 2});
  run("E10-warps-right", through_a_warp<kNone>);
  run("E10-barriers-of-others", paired<kOtherBarrier>);
  run("E10-barriers-of-others-between-stores", in_turn<kOtherBarrier>);
  run("E10-no-barrier", looked_at<kNoBarrier>);
  run("E10-block-reads-what-another-writes-later", watched<kBlockReadsBefore>, {2});
  run("E10-block-reads-what-another-wrote", watched<kBlockReadsLater>, {2});
  run("E10-no-barrier-of-the-cluster", clustered<kNoBarrier>, {2, kThreads, 8192, 0, 2});
  run("E10-mbarrier-of-another-block", clustered<kMbarrier>, {2, kThreads, 8192, 0, 2});
  run("E10-vote-for-a-barrier", through_a_warp<kVote>);
  run("E10-one-lane-waits", boxed<kOneLaneWaits>, {1, kThreads, 4096});
  run("E10-store-behind-the-arrival", boxed<kBehindTheArrival>, {1, kThreads, 4096});
  run("E10-one-lane-arrives", boxed<kOneLaneArrives>, {1, kThreads, 4096});
}
