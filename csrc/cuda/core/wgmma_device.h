// wgmma under nvcc, for the numbers of columns that the kernels use (PTX ISA 9.7.15.5). Macros, because the operands of
// an asm cannot come from a pack.
#pragma once

namespace vdcore::cuda {

// d is 64 x N. Only issues: see wgmma_fence, wgmma_commit, wgmma_wait.
template <typename E, int N>
struct Wgmma {
  // d = A B^T, or with kAdd d += A B^T; both in shared memory, by rows_descriptor.
  template <bool kAdd>
  static VDCORE_DEVICE void rows_times_rows(float (&d)[N / 2], uint64_t a, uint64_t b);
  // d += A B: A in registers, B in shared memory, by columns_descriptor.
  static VDCORE_DEVICE void registers_times_columns(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b);
};

// clang-format off
#define VDCORE_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define VDCORE_NAMES_30 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " VDCORE_TEN(1) ", " VDCORE_TEN(2)
#define VDCORE_NAMES_64 VDCORE_NAMES_30 ", %30, %31"
#define VDCORE_NAMES_80 VDCORE_NAMES_30 ", " VDCORE_TEN(3)
#define VDCORE_NAMES_96 VDCORE_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define VDCORE_NAMES_128 VDCORE_NAMES_80 ", " VDCORE_TEN(4) ", " VDCORE_TEN(5) ", %60, %61, %62, %63"
#define VDCORE_NAMES_160 VDCORE_NAMES_80 ", " VDCORE_TEN(4) ", " VDCORE_TEN(5) ", " VDCORE_TEN(6) ", " VDCORE_TEN(7)
#define VDCORE_NAMES_176 VDCORE_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"

#define VDCORE_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VDCORE_8(i) VDCORE_4(i), VDCORE_4(i + 4)
#define VDCORE_32(i) VDCORE_8(i), VDCORE_8(i + 8), VDCORE_8(i + 16), VDCORE_8(i + 24)
#define VDCORE_RESULT_64 VDCORE_32(0)
#define VDCORE_RESULT_96 VDCORE_32(0), VDCORE_8(32), VDCORE_8(40)
#define VDCORE_RESULT_128 VDCORE_32(0), VDCORE_32(32)
#define VDCORE_RESULT_160 VDCORE_32(0), VDCORE_32(32), VDCORE_8(64), VDCORE_8(72)
#define VDCORE_RESULT_176 VDCORE_RESULT_160, VDCORE_8(80)

// Of one type and number of columns; o0 to o5: numbers of the operands after the result.
#define VDCORE_WGMMA_OF(E, type, N, o0, o1, o2, o3, o4, o5)                                                      \
  template <>                                                                                                        \
  struct Wgmma<E, N> {                                                                                           \
    template <bool kAdd>                                                                                             \
    static VDCORE_DEVICE void rows_times_rows(float (&d)[N / 2], uint64_t a, uint64_t b) {              \
      asm volatile("{.reg .pred add; setp.ne.b32 add, " o2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32."    \
                   type "." type " {" VDCORE_NAMES_##N "}, " o0 ", " o1 ", add, 1, 1, 0, 0;}"                        \
                   : VDCORE_RESULT_##N : "l"(a), "l"(b), "n"(int{kAdd}) : "memory");                                 \
    }                                                                                                                \
    static VDCORE_DEVICE void registers_times_columns(float (&d)[N / 2], const uint32_t (&a)[4],        \
                                                                   uint64_t b) {                                     \
      asm volatile("{.reg .pred add; setp.ne.b32 add, " o5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32."    \
                   type "." type " {" VDCORE_NAMES_##N "}, {" o0 ", " o1 ", " o2 ", " o3 "}, " o4 ", add, 1, 1, 1;}" \
                   : VDCORE_RESULT_##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1) : "memory");     \
    }                                                                                                                \
  };
#define VDCORE_WGMMA(N, ...)                           \
  VDCORE_WGMMA_OF(bf16, "bf16", N, __VA_ARGS__) \
  VDCORE_WGMMA_OF(f16, "f16", N, __VA_ARGS__)

VDCORE_WGMMA(64, "%32", "%33", "%34", "%35", "%36", "%37")
VDCORE_WGMMA(96, "%48", "%49", "%50", "%51", "%52", "%53")
VDCORE_WGMMA(128, "%64", "%65", "%66", "%67", "%68", "%69")
VDCORE_WGMMA(176, "%88", "%89", "%90", "%91", "%92", "%93")
// clang-format on

}  // namespace vdcore::cuda
