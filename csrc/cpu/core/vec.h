// One vector type per instruction set, in GCC/Clang vector extensions: the same source is compiled once for each, and
// the compiler's flags decide. Everything lives in a namespace named after the instruction set, so that no function
// compiled for a newer one can be linked into the path of an older machine.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/tensor_view.h"

#ifndef VDCORE_ISA
#error "VDCORE_ISA names the namespace: baseline, avx2, avx512, amx or amx_emulated"
#endif

namespace vdcore::cpu::VDCORE_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;           // float32 lanes
constexpr int kRegisters = 32;  // vector registers
#elif defined(VDCORE_EMULATED_TILES)
constexpr int W = 16;  // a row of a tile; the compiler cuts vectors up
constexpr int kRegisters = 16;
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int kRegisters = 32;
#else
constexpr int W = 4;
constexpr int kRegisters = 16;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vu16 __attribute__((vector_size(2 * W)));
typedef uint16_t vu16_pair __attribute__((vector_size(4 * W)));  // of two vectors
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vu16_unaligned __attribute__((vector_size(2 * W), aligned(2), may_alias));

typedef uint16_t vu16_pair_unaligned __attribute__((vector_size(4 * W), aligned(2), may_alias));

constexpr float kInf = __builtin_huge_valf();

VDCORE_INLINE int64_t round_up(int64_t n) { return (n + W - 1) / W * W; }

VDCORE_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
VDCORE_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const vi_unaligned*>(p); }
VDCORE_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }

VDCORE_INLINE vf splat(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX__)
  return _mm256_set1_ps(x);
#else
  return x - vf{};  // x - 0 is x for every x, -0 included
#endif
}
VDCORE_INLINE vi splat(int32_t x) { return x - vi{}; }

// `yes` where the mask is set; NaN in the other operand is not looked at.
VDCORE_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
VDCORE_INLINE vf max(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
VDCORE_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }
VDCORE_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }

VDCORE_INLINE float sum(vf x) {
  float lane[W];
  store(lane, x);
  for (int width = W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

// ---- Lanes in another order --------------------------------------------------------------------------------------

#define VDCORE_LANES_4(f) f(0), f(1), f(2), f(3)
#define VDCORE_LANES_8(f) VDCORE_LANES_4(f), f(4), f(5), f(6), f(7)
#define VDCORE_LANES_16(f) VDCORE_LANES_8(f), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#if defined(__AVX512F__) || defined(VDCORE_EMULATED_TILES)
#define VDCORE_LANES VDCORE_LANES_16
#elif defined(__AVX__)
#define VDCORE_LANES VDCORE_LANES_8
#else
#define VDCORE_LANES VDCORE_LANES_4
#endif
// Lane i of the result is lane index(i) of a followed by b.
#if defined(__clang__)
#define VDCORE_SHUFFLE(a, b, index) __builtin_shufflevector(a, b, VDCORE_LANES(index))
#else
#define VDCORE_SHUFFLE(a, b, index) __builtin_shuffle(a, b, vi{VDCORE_LANES(index)})
#endif

VDCORE_INLINE vi iota() {
#define VDCORE_INDEX(i) (i)
  return vi{VDCORE_LANES(VDCORE_INDEX)};
#undef VDCORE_INDEX
}
VDCORE_INLINE vf swap_pairs(vf x) {  // 1 0 3 2 ...
#define VDCORE_INDEX(i) ((i) ^ 1)
  return VDCORE_SHUFFLE(x, x, VDCORE_INDEX);
#undef VDCORE_INDEX
}
VDCORE_INLINE vf repeat_low(vf x) {  // 0 0 1 1 ... of the lower half
#define VDCORE_INDEX(i) ((i) / 2)
  return VDCORE_SHUFFLE(x, x, VDCORE_INDEX);
#undef VDCORE_INDEX
}
VDCORE_INLINE vf repeat_high(vf x) {
#define VDCORE_INDEX(i) (W / 2 + (i) / 2)
  return VDCORE_SHUFFLE(x, x, VDCORE_INDEX);
#undef VDCORE_INDEX
}

// 2**x for x <= 128; relative error below 2e-7, 0 below 2**-126 (subnormals are flushed), NaN stays NaN.
// Minimax polynomial of degree 5 on [-1/2, 1/2] among those that are exactly 1 at 0: an online softmax multiplies by
// exp2(0) at every tile whose maximum is no new one, and an ulp too much would weigh early keys more than late ones.
VDCORE_INLINE vf exp2(vf x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2**23: adding it rounds to an integer in the low mantissa bits
  const vf shifted = x + kRound;
  const vf f = x - (shifted - kRound);
  vf p = f * 1.32695155e-3f + 9.67129041e-3f;
  p = p * f + 5.55071086e-2f;
  p = p * f + 2.40222469e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.f;
  const vi exponent = (as_int(shifted) - (0x4B400000 - 127)) << 23;
  return x < -126.f ? vf{} : p * as_float(exponent);
}

// log2(x) for normal positive x; absolute error below 2e-7 near 1, relative below 2e-7 elsewhere. Minimax polynomial of
// log2(1 + z) / z on [sqrt(1/2) - 1, sqrt(2) - 1].
VDCORE_INLINE vf log2(vf x) {
  const vi offset = as_int(x) - 0x3F3504F3;  // sqrt(1/2)
  const vi exponent = offset >> 23;
  const vf z = as_float(as_int(x) - (exponent << 23)) - 1.f;
  vf p = z * 1.25836905e-1f - 2.07269666e-1f;
  p = p * z + 2.15715616e-1f;
  p = p * z - 2.38944830e-1f;
  p = p * z + 2.87916254e-1f;
  p = p * z - 3.60703678e-1f;
  p = p * z + 4.80910640e-1f;
  p = p * z - 7.21347350e-1f;
  p = p * z + 1.44269500f;
  return p * z + __builtin_convertvector(exponent, vf);
}

// ---- Half precision ----------------------------------------------------------------------------------------------

// Lanes of 32 bits with these as their lower halves. One instruction, where compilers make two or three shuffles of
// __builtin_convertvector: half of what reading bfloat16 takes.
VDCORE_INLINE vu widen(vu16 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vu>(_mm512_maskz_cvtepu16_epi32(0xFFFF, reinterpret_cast<__m256i>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<vu>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#else
  return __builtin_convertvector(x, vu);
#endif
}

VDCORE_INLINE vf from_bf16(vu16 x) { return reinterpret_cast<vf>(widen(x) << 16); }
VDCORE_INLINE float from_bf16(uint16_t x) { return reinterpret_cast<vf>(vu{uint32_t{x} << 16})[0]; }

VDCORE_INLINE vu16_pair join(vu16 a, vu16 b) {
  vu16_pair both;
  memcpy(&both, &a, sizeof a);
  memcpy(reinterpret_cast<char*>(&both) + sizeof a, &b, sizeof b);
  return both;
}

// The lower halves of lanes whose upper halves are 0.
VDCORE_INLINE vu16 narrow(vu x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vu16>(_mm512_maskz_cvtepi32_epi16(0xFFFF, reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i wide = reinterpret_cast<__m256i>(x);
  return reinterpret_cast<vu16>(_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
  return __builtin_convertvector(x, vu16);
#endif
}

// The lower halves of a, then those of b.
VDCORE_INLINE vu16_pair narrow(vu a, vu b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i mixed = _mm256_packus_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  return reinterpret_cast<vu16_pair>(_mm256_permute4x64_epi64(mixed, 0xD8));  // it packs half by half
#else
  return join(narrow(a), narrow(b));
#endif
}

// Rounded to nearest even, in the lower half of a lane. NaN, which must not round to infinity, becomes all ones.
VDCORE_INLINE vu bf16_bits(vf x) {
  const vu bits = reinterpret_cast<vu>(x);
  return ((bits + (((bits >> 16) & 1u) + 0x7FFFu)) | reinterpret_cast<vu>(x != x)) >> 16;
}
#if defined(__AVX512BF16__)
VDCORE_INLINE vu16 to_bf16(vf x) {
  const __m256bh half = _mm512_cvtneps_pbh(x);
  vu16 bits;
  memcpy(&bits, &half, sizeof bits);
  return bits;
}
VDCORE_INLINE vu16_pair to_bf16(vf x, vf y) {
  const __m512bh both = _mm512_cvtne2ps_pbh(y, x);
  vu16_pair bits;
  memcpy(&bits, &both, sizeof bits);
  return bits;
}
#else
VDCORE_INLINE vu16 to_bf16(vf x) { return narrow(bf16_bits(x)); }
VDCORE_INLINE vu16_pair to_bf16(vf x, vf y) { return narrow(bf16_bits(x), bf16_bits(y)); }
#endif

#if defined(__AVX512F__)
VDCORE_INLINE vf from_f16(vu16 x) { return _mm512_maskz_cvtph_ps(0xFFFF, reinterpret_cast<__m256i>(x)); }
VDCORE_INLINE vu16 to_f16(vf x) {
  return reinterpret_cast<vu16>(_mm512_maskz_cvtps_ph(0xFFFF, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
VDCORE_INLINE vf from_f16(vu16 x) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x)); }
VDCORE_INLINE vu16 to_f16(vf x) {
  return reinterpret_cast<vu16>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// Bit arithmetic; exact for every input, subnormals, infinities and NaN included.
VDCORE_INLINE vf from_f16(vu16 x) {
  const vu wide = widen(x);
  const vu sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7FFFu) << 13;
  const vf scaled = reinterpret_cast<vf>(magnitude) * 0x1p112f;  // moves the exponent bias, subnormals too
  const vu special = reinterpret_cast<vu>(scaled) | 0x7F800000u;
  const vi is_special = (magnitude >= 0x0F800000u);
  return reinterpret_cast<vf>((is_special ? special : reinterpret_cast<vu>(scaled)) | sign);
}
VDCORE_INLINE vu16 to_f16(vf x) {
  const vu bits = reinterpret_cast<vu>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const vu normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Adding 0.5 lines the subnormal's last bit up with float's: the addition rounds it to nearest even.
  const vu subnormal = reinterpret_cast<vu>(reinterpret_cast<vf>(magnitude) + 0.5f) - 0x3F000000u;
  const vi tiny = (magnitude < 0x38800000u), huge = (magnitude >= 0x477FF000u), nan = (magnitude > 0x7F800000u);
  vu half = tiny ? subnormal : normal;
  half = huge ? vu{} + 0x7C00u : half;
  half = nan ? vu{} + 0x7E00u : half;
  return narrow(half | sign);
}
#endif

// ---- Rows of any dtype, in float32 -------------------------------------------------------------------------------

// Past the caches, for results that nobody reads soon: an ordinary store would first read the line it overwrites. The
// address is aligned to the vector's size; stream_fence() before other threads may look.
template <typename V>
VDCORE_INLINE void stream_bytes(void* p, V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(x));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(x));
#endif
  memcpy(p, &x, sizeof x);
}
VDCORE_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <DType T>
struct Element;
template <>
struct Element<DType::f32> {
  typedef float type;
  static VDCORE_INLINE vf load(const float* p) { return VDCORE_ISA::load(p); }
  static VDCORE_INLINE void store(float* p, vf x) { VDCORE_ISA::store(p, x); }
  static VDCORE_INLINE void stream(float* p, vf x) { stream_bytes(p, x); }
  static VDCORE_INLINE void store(float* p, vf x, vf y) { store(p, x), store(p + W, y); }
  static VDCORE_INLINE void stream(float* p, vf x, vf y) { stream(p, x), stream(p + W, y); }
};
template <>
struct Element<DType::bf16> {
  typedef uint16_t type;
  static VDCORE_INLINE vf load(const uint16_t* p) { return from_bf16(*reinterpret_cast<const vu16_unaligned*>(p)); }
  static VDCORE_INLINE void store(uint16_t* p, vf x) { *reinterpret_cast<vu16_unaligned*>(p) = to_bf16(x); }
  static VDCORE_INLINE void stream(uint16_t* p, vf x) { stream_bytes(p, to_bf16(x)); }
  static VDCORE_INLINE void store(uint16_t* p, vf x, vf y) {
    *reinterpret_cast<vu16_pair_unaligned*>(p) = to_bf16(x, y);
  }
  static VDCORE_INLINE void stream(uint16_t* p, vf x, vf y) { stream_bytes(p, to_bf16(x, y)); }
};
template <>
struct Element<DType::f16> {
  typedef uint16_t type;
  static VDCORE_INLINE vf load(const uint16_t* p) { return from_f16(*reinterpret_cast<const vu16_unaligned*>(p)); }
  static VDCORE_INLINE void store(uint16_t* p, vf x) { *reinterpret_cast<vu16_unaligned*>(p) = to_f16(x); }
  static VDCORE_INLINE void stream(uint16_t* p, vf x) { stream_bytes(p, to_f16(x)); }
  static VDCORE_INLINE void store(uint16_t* p, vf x, vf y) {
    *reinterpret_cast<vu16_pair_unaligned*>(p) = join(to_f16(x), to_f16(y));
  }
  static VDCORE_INLINE void stream(uint16_t* p, vf x, vf y) { stream_bytes(p, join(to_f16(x), to_f16(y))); }
};

// The last, partial vector of a row goes through a small buffer: memory beyond the row is never touched.
template <DType T>
VDCORE_INLINE vf load_partial(const typename Element<T>::type* p, int64_t n) {
  typename Element<T>::type lane[W] = {};
  memcpy(lane, p, n * sizeof(lane[0]));
  return Element<T>::load(lane);
}
template <DType T>
VDCORE_INLINE void store_partial(typename Element<T>::type* p, vf x, int64_t n) {
  typename Element<T>::type lane[W];
  Element<T>::store(lane, x);
  memcpy(p, lane, n * sizeof(lane[0]));
}

// out[0:n] = float32 of the row, out[n:round_up(n)] = 0.
template <DType T>
VDCORE_INLINE void read_row(const char* row, int64_t n, float* out) {
  const auto* p = reinterpret_cast<const typename Element<T>::type*>(row);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, Element<T>::load(p + i));
  if (i < n) store(out + i, load_partial<T>(p + i, n - i));
}

// The row = factor * in[0:n], rounded to nearest even.
template <DType T>
VDCORE_INLINE void write_row(char* row, int64_t n, const float* in, float factor) {
  auto* p = reinterpret_cast<typename Element<T>::type*>(row);
  int64_t i = 0;
  for (; i + W <= n; i += W) Element<T>::store(p + i, load(in + i) * factor);
  if (i < n) store_partial<T>(p + i, load(in + i) * factor, n - i);
}
// The same past the caches: n a multiple of W, the row aligned to W elements.
template <DType T>
VDCORE_INLINE void stream_row(char* row, int64_t n, const float* in, float factor) {
  auto* p = reinterpret_cast<typename Element<T>::type*>(row);
  for (int64_t i = 0; i < n; i += W) Element<T>::stream(p + i, load(in + i) * factor);
}

// Calls body with the dtype as a constant.
template <DType T>
struct Typed {
  static constexpr DType value = T;
};
template <typename Body>
VDCORE_INLINE void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(Typed<DType::f32>{});
    case DType::f16:
      return body(Typed<DType::f16>{});
    case DType::bf16:
      return body(Typed<DType::bf16>{});
  }
}

}  // namespace vdcore::cpu::VDCORE_ISA
