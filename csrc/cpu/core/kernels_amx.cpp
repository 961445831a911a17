// Table of operators with products of bfloat16: what has none is of VDCORE_FLOATS, the kernels of a processor that also
// has an instruction that rounds, or else of VDCORE_REST.
#include "cpu/core/amx.h"
#include "cpu/core/kernels.h"

#define VDCORE_DECLARATION(function, Arguments) void function(const Arguments&);
#define VDCORE_ENTRY(function, Arguments) function,
#define VDCORE_USING(function, Arguments) using VDCORE_FLOATS::function;

namespace vdcore::cpu::VDCORE_REST {
VDCORE_OPERATORS(VDCORE_DECLARATION)
}
namespace vdcore::cpu::VDCORE_FLOATS {
VDCORE_ROUNDING_OPERATORS(VDCORE_DECLARATION)
}

namespace vdcore::cpu::VDCORE_ISA {

using namespace VDCORE_REST;  // hidden by what is declared here
VDCORE_AMX_OPERATORS(VDCORE_DECLARATION)
VDCORE_ROUNDING_OPERATORS(VDCORE_USING)

#if defined(VDCORE_EMULATED_TILES)
int64_t tile_products() { return tile_registers().products; }
#elif defined(VDCORE_DOT_PRODUCTS)
constexpr int64_t (*tile_products)() = nullptr;
#else
int64_t tile_products() { return -1; }
#endif

extern const Kernels table;
const Kernels table = {VDCORE_ISA_NAME, VDCORE_OPERATORS(VDCORE_ENTRY) tile_products};

}  // namespace vdcore::cpu::VDCORE_ISA
