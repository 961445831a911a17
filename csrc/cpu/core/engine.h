// The CPU engine as the bindings see it.
#pragma once

#include "cpu/core/kernels.h"

namespace vdcore::cpu {

// The best instruction set of this machine, or the one that VDCORE_CPU_ISA names. Throws std::invalid_argument for a
// name that is unknown or that this machine cannot run.
const Kernels& kernels();

}  // namespace vdcore::cpu
