// The products of tile.h.
#include "cpu/core/tile.h"

namespace vdcore::cpu::VDCORE_ISA {

VDCORE_PRODUCTS(, Prefetch)
VDCORE_PRODUCTS(, NoPrefetch)

}  // namespace vdcore::cpu::VDCORE_ISA
