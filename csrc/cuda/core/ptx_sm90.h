// What sm_90a adds to PTX, as csrc/cuda/core/ptx.h: mbarriers, the tensor memory accelerator (TMA), wgmma, registers
// that move between warpgroups, named barriers.
//
// wgmma multiplies 64 rows by 16 of K. Thread t of the warpgroup holds of the 64 x N result d[i]: row 16 (t / 32) +
// (t % 32) / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2; and of a 64 x 16 first operand a[i], two values:
// row 16 (t / 32) + (t % 32) / 4 + 8 (i % 2), columns 8 (i / 2) + 2 (t % 4) and the next.
#pragma once

#include "cuda/core/ptx.h"

// For a parameter that holds tensor maps: the accelerator reads them where the launch put them.
#ifdef VDCORE_EMULATE
#define VDCORE_GRID_CONSTANT
#include "emulator/ptx_sm90_emulated.h"
#else
#define VDCORE_GRID_CONSTANT __grid_constant__
#include "cuda/core/ptx_sm90_device.h"
#endif

namespace vdcore::cuda {

// Two blocks that run at the same time on neighbouring multiprocessors, or one by itself. A number of shared memory or
// of a barrier there is one in any block: that of the block with a rank is reached by its rank.
constexpr int kMostInCluster = 2;

// What a load leaves in L2: policies that createpolicy would make, as CUTLASS has them.
constexpr uint64_t kReadOnce = 0x12F0000000000000, kReadAgain = 0x14F0000000000000;

// ---- Tiles in shared memory and their descriptors (PTX ISA 9.7.15.5.1) ----
// Tiles lie as TMA writes them. With a swizzle of 128 bytes: rows of 64 channels, 8 rows in 1024 bytes, in which the
// 16-byte piece i of row r stands at i ^ r. With one of 64 bytes: rows of 32 channels, 8 rows in 512 bytes, in which
// piece i of row r stands at i ^ (r / 2 % 4).

// Bits 0-13: address, 16-29: leading, 32-45: stride byte offset, all without their last 4 bits; 62-63: the swizzle, 1
// for 128 bytes and 2 for 64.
VDCORE_DEVICE uint64_t matrix_descriptor(uint64_t swizzle, uint32_t address, uint32_t leading, uint32_t stride) {
  return swizzle << 62 | static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32;
}

// Rows of 64 channels are the M or the N of the product, channels its K; the address is that of the first of 16
// channels. The leading offset has no meaning here.
VDCORE_DEVICE uint64_t rows_descriptor(uint32_t address) { return matrix_descriptor(1, address, 16, 1024); }

// Rows are the K of the product, channels its N, in columns of kChannels, 64 or 32, that are `column` bytes apart and
// divide N; the address is that of the first of 16 rows.
template <int kChannels>
VDCORE_DEVICE uint64_t columns_descriptor(uint32_t address, uint32_t column) {
  static_assert(kChannels == 64 || kChannels == 32);
  return matrix_descriptor(kChannels == 64 ? 1 : 2, address, column, 16 * kChannels);
}

}  // namespace vdcore::cuda
