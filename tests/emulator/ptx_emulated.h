// Bodies of csrc/cuda/core/ptx.h on the CPU: what the PTX ISA says of each instruction's operands and results.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "emulator/emulator.h"

// Last parameters of an instruction that whole warps execute at one place: where it stands.
#define VDCORE_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace vdcore::cuda {

VDCORE_DEVICE uint32_t thread_index() { return emulator::position().thread; }
VDCORE_DEVICE uint32_t block_index() { return emulator::position().block; }
VDCORE_DEVICE char* shared_memory() { return emulator::shared_memory(); }

// ---- Memory ----

namespace emulated {
// Of one instruction, or of several where the value is no number of bytes that one can have.
template <typename V>
constexpr size_t alignment = sizeof(V) <= 16 && (sizeof(V) & (sizeof(V) - 1)) == 0 ? sizeof(V) : alignof(V);
template <typename V>
inline V load(const void* p, bool constant) {
  emulator::check_access(p, sizeof(V), alignment<V>);
  emulator::loaded(p, sizeof(V), constant);
  return *static_cast<const V*>(p);
}
}  // namespace emulated

template <typename V>
VDCORE_DEVICE V load_global(const void* p) {
  return emulated::load<V>(p, true);
}
VDCORE_DEVICE Vec4 load_global_or(const void* p, bool there, uint32_t otherwise) {
  return there ? load_global<Vec4>(p) : Vec4{{otherwise, otherwise, otherwise, otherwise}};
}
template <typename V>
VDCORE_DEVICE V load_written(const void* p) {
  return emulated::load<V>(p, false);
}
template <typename V>
VDCORE_DEVICE void store_global(void* p, const V& v) {
  emulator::check_access(p, sizeof(V), emulated::alignment<V>);
  emulator::stored(p, sizeof(V));
  *static_cast<V*>(p) = v;
}
VDCORE_DEVICE void store_global_if(void* p, const Vec4& v, bool there) {
  if (there) store_global(p, v);
}
template <typename V>
VDCORE_DEVICE V load_shared(const void* p) {
  return emulated::load<V>(p, false);
}
template <typename V>
VDCORE_DEVICE void store_shared(void* p, const V& v) {
  store_global(p, v);
}

namespace emulated {

struct Exchange {
  uint32_t in, out;
  int lanes;
};
inline Exchange& exchange(void* const* lanes, int lane) { return *static_cast<Exchange*>(lanes[lane]); }

inline void movmatrix(void* const* lanes) {
  const auto element = [&](int row, int column) {
    return exchange(lanes, row * 4 + column / 2).in >> column % 2 * 16 & 0xffff;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int i = lane / 4, j = lane % 4 * 2;
    exchange(lanes, lane).out = element(j, i) | element(j + 1, i) << 16;
  }
}
inline void shfl_xor(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    const int other = lane ^ exchange(lanes, lane).lanes;
    if (other < 0 || other > 31) emulator::fail("a shuffle with lane " + std::to_string(other));
    exchange(lanes, lane).out = exchange(lanes, other).in;
  }
}
inline void shfl_first(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (exchange(lanes, lane).in != exchange(lanes, 0).in)
      emulator::fail("lanes of a warp do not agree on what they must");
    exchange(lanes, lane).out = exchange(lanes, 0).in;
  }
}
inline void vote(void* const* lanes) {
  uint32_t set = 0;
  for (int lane = 0; lane < 32; ++lane) set |= (exchange(lanes, lane).in ? 1u : 0u) << lane;
  for (int lane = 0; lane < 32; ++lane) exchange(lanes, lane).out = set;
}

inline uint32_t meet(emulator::Complete complete, uint32_t in, int lanes, const char* what,
                     const emulator::Site& site = {}) {
  Exchange mine{in, 0, lanes};
  emulator::meet_warp(complete, &mine, what, site);
  return mine.out;
}

template <typename To, typename From>
inline To bits_of(From x) {
  To y;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  float value;
  if (exponent == 31)
    value = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  else
    value = exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24);
  return h >> 15 ? -value : value;
}
struct HalfTable {
  float value[65536];
  HalfTable() {
    for (int i = 0; i < 65536; ++i) value[i] = half_to_float(static_cast<uint16_t>(i));
  }
};
inline const HalfTable half_table;

inline uint16_t float_to_half(float x) {
  const uint32_t bits = bits_of<uint32_t>(x), sign = bits >> 16 & 0x8000;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | 0x7fff);
  const float a = std::fabs(x);
  if (a >= 65520.f) return static_cast<uint16_t>(sign | 0x7c00);
  if (a == 0) return static_cast<uint16_t>(sign);
  int exponent;
  std::frexp(a, &exponent);
  if (exponent < -13) exponent = -13;
  const int64_t steps = std::llrint(std::ldexp(static_cast<double>(a), 11 - exponent));  // of 2^(exponent - 11)
  if (exponent == -13)
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(steps));  // subnormal, or the first one
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(((exponent + 13) << 10) + steps));
}

template <typename E>
inline float element(uint16_t x);
template <>
inline float element<bf16>(uint16_t x) {
  return bits_of<float>(static_cast<uint32_t>(x) << 16);
}
template <>
inline float element<f16>(uint16_t x) {
  return half_table.value[x];
}
template <typename E>
inline uint16_t rounded(float x);
template <>
inline uint16_t rounded<bf16>(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = bits_of<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <>
inline uint16_t rounded<f16>(float x) {
  return float_to_half(x);
}

struct Mma {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
template <typename E>
inline void mma(void* const* lanes) {
  float a[16][16], b[16][8];  // [row][k], [k][column]
  const auto lo = [](uint32_t x) { return element<E>(static_cast<uint16_t>(x)); };
  const auto hi = [](uint32_t x) { return element<E>(static_cast<uint16_t>(x >> 16)); };
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& mine = *static_cast<Mma*>(lanes[lane]);
    const int r = lane / 4, k = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      a[r + i % 2 * 8][k + i / 2 * 8] = lo(mine.a[i]);
      a[r + i % 2 * 8][k + i / 2 * 8 + 1] = hi(mine.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[k + i * 8][r] = lo(mine.b[i]);
      b[k + i * 8 + 1][r] = hi(mine.b[i]);
    }
  }
  float product[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<Mma*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) c[i] += product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace emulated

// ---- Among lanes and warps ----

VDCORE_DEVICE uint32_t transpose8x8(uint32_t x, VDCORE_SITE) {
  return emulated::meet(emulated::movmatrix, x, 0, "movmatrix", {file, line});
}
VDCORE_DEVICE float shuffle_xor(float x, int lanes) {
  const uint32_t in = emulated::bits_of<uint32_t>(x);
  return emulated::bits_of<float>(emulated::meet(emulated::shfl_xor, in, lanes, "shfl"));
}
VDCORE_DEVICE uint32_t ballot(bool x) { return emulated::meet(emulated::vote, x, 0, "vote"); }
VDCORE_DEVICE bool warp_any(bool x) { return ballot(x) != 0; }
VDCORE_DEVICE void rare() {}
VDCORE_DEVICE void sync_warp() { emulator::sync_warp(); }
VDCORE_DEVICE void sync_block(VDCORE_SITE) { emulator::meet_block(0, emulator::position().threads, {file, line}); }

// ---- Arithmetic ----

template <typename E>
VDCORE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, VDCORE_SITE) {
  emulated::Mma mine{c, a, {b0, b1}};
  emulator::meet_warp(emulated::mma<E>, &mine, "mma", {file, line});
}
template <typename E>
VDCORE_DEVICE uint32_t pack(float lo, float hi) {
  return emulated::rounded<E>(lo) | static_cast<uint32_t>(emulated::rounded<E>(hi)) << 16;
}
template <typename E>
VDCORE_DEVICE Float2 unpack(uint32_t x) {
  return {emulated::element<E>(static_cast<uint16_t>(x)), emulated::element<E>(static_cast<uint16_t>(x >> 16))};
}
VDCORE_DEVICE float exp2_approx(float x) { return std::exp2(x); }
VDCORE_DEVICE float log2_approx(float x) { return std::log2(x); }
VDCORE_DEVICE float reciprocal(float x) { return 1 / x; }
VDCORE_DEVICE float reciprocal_root(float x) { return 1 / std::sqrt(x); }
VDCORE_DEVICE float maximum(float a, float b) { return std::fmax(a, b); }
VDCORE_DEVICE void forget(int&) {}
VDCORE_DEVICE bool either_nan(float a, float b) { return std::isnan(a) || std::isnan(b); }
VDCORE_DEVICE float infinity() { return std::numeric_limits<float>::infinity(); }

}  // namespace vdcore::cuda
