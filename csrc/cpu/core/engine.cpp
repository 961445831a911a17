#include "cpu/core/engine.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(VDCORE_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vdcore::cpu {

namespace baseline {
extern const Kernels table;
}
namespace amx_emulated {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif
#if defined(VDCORE_HAS_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels table;
}
#endif
#if defined(VDCORE_HAS_AMX)
namespace amx {
extern const Kernels table;
}
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*runs)();
  bool (*pays)();  // whether it is chosen where nobody names one
};

bool always() { return true; }
bool never() { return false; }

#if defined(__x86_64__)
bool avx2_runs() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool avx512_runs() {
  return avx2_runs() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#if defined(VDCORE_HAS_AVX512_BF16)
bool avx512_bf16_runs() { return avx512_runs() && __builtin_cpu_supports("avx512bf16"); }
// AMD's issue as many dot products as FMAs, and each is two of them; Intel's issue half as many.
bool avx512_bf16_pays() { return avx512_bf16_runs() && __builtin_cpu_is("amd"); }
#endif

#if defined(VDCORE_HAS_AMX)
// The processor has the tiles, and the operating system saves them and lets this process use them. Linux gives that
// permission once to a process and all its threads, and its children inherit it.
bool amx_runs() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of EDX, leaf 7
  constexpr unsigned kSaved = 3u << 17;                   // configuration and data, of XCR0
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d, xcr0, high;
  if (!avx512_runs() || !__builtin_cpu_supports("avx512bf16") || !__get_cpuid_count(7, 0, &a, &b, &c, &d) ||
      (d & (kBf16 | kTile)) != (kBf16 | kTile))
    return false;
  __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  return (xcr0 & kSaved) == kSaved && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const Kernels& find() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const Candidate candidates[] = {
#if defined(VDCORE_HAS_AMX)
      {&amx::table, amx_runs, amx_runs},
#endif
#if defined(VDCORE_HAS_AVX512_BF16)
      {&avx512_bf16::table, avx512_bf16_runs, avx512_bf16_pays},
#endif
#if defined(__x86_64__)
      {&avx512::table, avx512_runs, avx512_runs},
      {&avx2::table, avx2_runs, avx2_runs},
#endif
      {&baseline::table, always, always},
      {&amx_emulated::table, always, never},
  };
  const char* wanted = std::getenv("VDCORE_CPU_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  std::string known;
  for (const Candidate& c : candidates) {
    if (wanted ? std::string(wanted) == c.kernels->isa : c.pays()) {
      if (wanted && !c.runs())
        throw std::invalid_argument(std::string("VDCORE_CPU_ISA: this machine cannot run ") + wanted);
      return *c.kernels;
    }
    known += std::string(known.empty() ? "" : ", ") + c.kernels->isa;
  }
  throw std::invalid_argument("VDCORE_CPU_ISA must be one of " + known + ", got " + wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& found = find();
  return found;
}

}  // namespace vdcore::cpu
