#include "cpu/core/engine.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vdcore::cpu {

namespace baseline {
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

namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

const Kernels& find() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2_runs =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512_runs = avx2_runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const Candidate candidates[] = {{&avx512::table, avx512_runs}, {&avx2::table, avx2_runs}, {&baseline::table, true}};
#else
  const Candidate candidates[] = {{&baseline::table, true}};
#endif
  const char* wanted = std::getenv("VDCORE_CPU_ISA");
  std::string known;
  for (const Candidate& c : candidates) {
    const bool named = wanted && std::string(wanted) == c.kernels->isa;
    if (c.runs && (!wanted || !*wanted || named)) return *c.kernels;
    if (named) throw std::invalid_argument(std::string("VDCORE_CPU_ISA: this processor cannot run ") + wanted);
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
