// Bodies of csrc/cuda/core/ptx.h under nvcc. Instructions of a whole warp are volatile: they must not move into a
// branch.
#pragma once

namespace vdcore::cuda {

VDCORE_DEVICE uint32_t thread_index() { return threadIdx.x; }
VDCORE_DEVICE uint32_t block_index() { return blockIdx.x; }

extern __shared__ __align__(1024) char vdcore_shared[];
VDCORE_DEVICE char* shared_memory() { return vdcore_shared; }

// ---- Memory ----

// What no thread writes while the kernel runs.
template <typename V>
VDCORE_DEVICE V load_global(const void* p);
template <>
VDCORE_DEVICE Vec4 load_global<Vec4>(const void* p) {
  Vec4 v;
  asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3]) : "l"(p));
  return v;
}
// Where `there` does not hold, `otherwise` in every word: a predicate, and no branch that loads could not be moved
// over.
VDCORE_DEVICE Vec4 load_global_or(const void* p, bool there, uint32_t otherwise) {
  Vec4 v{{otherwise, otherwise, otherwise, otherwise}};
  asm("{.reg .pred there; setp.ne.u32 there, %5, 0;\n @there ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(v.x[0]), "+r"(v.x[1]), "+r"(v.x[2]), "+r"(v.x[3])
      : "l"(p), "r"(static_cast<uint32_t>(there)));
  return v;
}
#define VDCORE_LOAD_GLOBAL(V, type, constraint)                          \
  template <>                                                            \
  VDCORE_DEVICE V load_global<V>(const void* p) {                        \
    V v;                                                                 \
    asm("ld.global.nc." type " %0, [%1];" : "=" constraint(v) : "l"(p)); \
    return v;                                                            \
  }
VDCORE_LOAD_GLOBAL(uint16_t, "b16", "h")
VDCORE_LOAD_GLOBAL(int64_t, "b64", "l")
VDCORE_LOAD_GLOBAL(float, "f32", "f")
#undef VDCORE_LOAD_GLOBAL

// What this kernel itself writes, too.
template <typename V>
VDCORE_DEVICE V load_written(const void* p) {
  return *static_cast<const V*>(p);
}
template <typename V>
VDCORE_DEVICE void store_global(void* p, const V& v) {
  *static_cast<V*>(p) = v;
}

VDCORE_DEVICE void store_global_if(void* p, const Vec4& v, bool there) {
  asm volatile(
      "{.reg .pred there; setp.ne.u32 there, %5, 0;\n @there st.global.v4.b32 [%4], {%0, %1, %2, %3};}" ::"r"(v.x[0]),
      "r"(v.x[1]), "r"(v.x[2]), "r"(v.x[3]), "l"(p), "r"(static_cast<uint32_t>(there))
      : "memory");
}

template <typename V>
VDCORE_DEVICE V load_shared(const void* p) {
  return *static_cast<const V*>(p);
}
template <typename V>
VDCORE_DEVICE void store_shared(void* p, const V& v) {
  *static_cast<V*>(p) = v;
}

VDCORE_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- Among lanes and warps ----

// The 8x8 matrix whose row lane / 4, columns 2 * (lane % 4) and the next every lane holds, transposed.
VDCORE_DEVICE uint32_t transpose8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
VDCORE_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
VDCORE_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
VDCORE_DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }
// Marks a branch that few calls ever take: profilers count its event, `vdcore doctor` leaves its instructions out.
VDCORE_DEVICE void rare() { asm volatile("pmevent 0;"); }
VDCORE_DEVICE void sync_warp() { __syncwarp(); }
VDCORE_DEVICE void sync_block() { __syncthreads(); }

// ---- Arithmetic ----

// c[16, 8] += a[16, 16] b[16, 8]. a: rows r and r + 8 of columns 0 to 7, then of columns 8 to 15; b: rows 0 to 7, then
// 8 to 15 of its column lane / 4; c: two columns of row r, then of row r + 8.
template <typename E>
VDCORE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <typename E>
VDCORE_DEVICE uint32_t pack(float lo, float hi);
#define VDCORE_ARITHMETIC(E, type)                                                             \
  template <>                                                                                  \
  VDCORE_DEVICE void mma<E>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));              \
  }                                                                                            \
  template <>                                                                                  \
  VDCORE_DEVICE uint32_t pack<E>(float lo, float hi) {                                         \
    uint32_t x;                                                                                \
    asm("cvt.rn." type "x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));                     \
    return x;                                                                                  \
  }
VDCORE_ARITHMETIC(bf16, "bf16")
VDCORE_ARITHMETIC(f16, "f16")
#undef VDCORE_ARITHMETIC

template <typename E>
VDCORE_DEVICE Float2 unpack(uint32_t x);
template <>
VDCORE_DEVICE Float2 unpack<bf16>(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
template <>
VDCORE_DEVICE Float2 unpack<f16>(uint32_t x) {
  Float2 v;
  asm("{.reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}"
      : "=f"(v.lo), "=f"(v.hi)
      : "r"(x));
  return v;
}

VDCORE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VDCORE_DEVICE float log2_approx(float x) { return __log2f(x); }
VDCORE_DEVICE float reciprocal(float x) {  // one instruction; a division that rounds correctly is a call
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VDCORE_DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
VDCORE_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
// What follows from x is computed anew behind it, not kept in registers from before.
VDCORE_DEVICE void forget(int& x) { asm volatile("" : "+r"(x)); }
VDCORE_DEVICE bool either_nan(float a, float b) { return bool(a != a) | bool(b != b); }  // one instruction
VDCORE_DEVICE float infinity() { return __int_as_float(0x7f800000); }

}  // namespace vdcore::cuda
