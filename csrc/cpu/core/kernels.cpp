// Compiled once per instruction set, like every file that includes vec.h: its table of operators.
#include "cpu/core/kernels.h"

#define VDCORE_STRING_(x) #x
#define VDCORE_STRING(x) VDCORE_STRING_(x)
#define VDCORE_DECLARATION(function, Arguments) void function(const Arguments&);
#define VDCORE_ENTRY(function, Arguments) function,

namespace vdcore::cpu::VDCORE_ISA {

VDCORE_OPERATORS(VDCORE_DECLARATION)

extern const Kernels table;
const Kernels table = {VDCORE_STRING(VDCORE_ISA), VDCORE_OPERATORS(VDCORE_ENTRY) nullptr};

}  // namespace vdcore::cpu::VDCORE_ISA
