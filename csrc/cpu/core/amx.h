// AMX's tile registers, and an emulated twin of them that runs on every machine: eight registers of 16 rows of 64
// bytes. Compiled for the instruction sets amx and amx_emulated alone.
//
// Semantics as in Intel's Architecture Instruction Set Extensions Reference, TDPBF16PS: both operands hold pairs of
// bfloat16. Row m of the left one has 16 pairs of terms, (2r, 2r + 1) at r; row r of the right one has for each of 16
// columns the terms (2r, 2r + 1). Sums are float32, even and odd terms apart, subnormals are 0, and nothing traps.
#pragma once

#include "cpu/core/vec.h"

namespace vdcore::cpu::VDCORE_ISA {

constexpr int64_t kTileRows = 16;   // of a register; columns of float32 too
constexpr int64_t kTileTerms = 32;  // bfloat16 of a row
constexpr int64_t kTileBytes = 64;  // of a row
constexpr int kTileRegisters = 8;

#if defined(VDCORE_EMULATED_TILES)

struct TileRegisters {
  bool configured;
  int64_t products;  // tdpbf16ps since the thread began
  alignas(64) char rows[kTileRegisters][kTileRows][kTileBytes];
};
inline TileRegisters& tile_registers() {
  static thread_local TileRegisters mine;
  return mine;
}

// What a register that nobody configured does is a fault: it stops the process.
VDCORE_INLINE TileRegisters& configured_tiles() {
  TileRegisters& tiles = tile_registers();
  if (!tiles.configured) __builtin_trap();
  return tiles;
}

// Registers are there from the construction of this to its end.
class TileScope {
 public:
  TileScope() {
    tile_registers().configured = true;
    memset(tile_registers().rows, 0, sizeof tile_registers().rows);
  }
  ~TileScope() { tile_registers().configured = false; }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <int T>
inline void tile_zero() {
  memset(configured_tiles().rows[T], 0, sizeof TileRegisters::rows[T]);
}
template <int T>
inline void tile_load(const void* at, int64_t stride) {  // in bytes
  for (int64_t r = 0; r < kTileRows; ++r)
    memcpy(configured_tiles().rows[T][r], static_cast<const char*>(at) + r * stride, kTileBytes);
}
template <int T>
inline void tile_store(void* at, int64_t stride) {
  for (int64_t r = 0; r < kTileRows; ++r)
    memcpy(static_cast<char*>(at) + r * stride, configured_tiles().rows[T][r], kTileBytes);
}

VDCORE_INLINE vf normal_or_zero(vf x) {
  return select((as_int(x) & 0x7F800000) == 0, as_float(as_int(x) & static_cast<int32_t>(0x80000000)), x);
}

// Register C += A B.
template <int C, int A, int B>
inline void tile_multiply() {
  TileRegisters& tiles = configured_tiles();
  ++tiles.products;
  vu right[kTileRows];
  memcpy(right, tiles.rows[B], sizeof right);
  for (int64_t m = 0; m < kTileRows; ++m) {
    uint32_t left[kTileRows];
    memcpy(left, tiles.rows[A][m], sizeof left);
    vf even = {}, odd = {}, sum;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const vu pair = vu{} + left[r];
      even += normal_or_zero(reinterpret_cast<vf>(pair << 16)) * normal_or_zero(reinterpret_cast<vf>(right[r] << 16));
      odd += normal_or_zero(reinterpret_cast<vf>(pair & 0xFFFF0000u)) *
             normal_or_zero(reinterpret_cast<vf>(right[r] & 0xFFFF0000u));
    }
    memcpy(&sum, tiles.rows[C][m], sizeof sum);
    sum = normal_or_zero(sum + normal_or_zero(even + odd));
    memcpy(tiles.rows[C][m], &sum, sizeof sum);
  }
}

#elif defined(VDCORE_DOT_PRODUCTS)

// No tiles: AVX512-BF16's dot products take the same operands. See pairs.h.
struct TileScope {
  TileScope() {}
};

#else

// The instructions themselves, without the compiler's intrinsics: those of GCC tell it of no memory that a load reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr TileConfig() {
    for (int i = 0; i < kTileRegisters; ++i) bytes[i] = kTileBytes, rows[i] = kTileRows;
  }
};

// Registers are there from the construction of this to its end: a thread that holds some pays for them, 8 KB, whenever
// it loses its processor.
class TileScope {
 public:
  TileScope() {
    static constexpr TileConfig config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileScope() { __asm__ volatile("tilerelease" ::: "memory"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

template <int T>
VDCORE_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
VDCORE_INLINE void tile_load(const void* at, int64_t stride) {  // in bytes
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(at), "r"(stride) : "memory");
}
template <int T>
VDCORE_INLINE void tile_store(void* at, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(at), "r"(stride) : "memory");
}
// Register C += A B.
template <int C, int A, int B>
VDCORE_INLINE void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace vdcore::cpu::VDCORE_ISA
