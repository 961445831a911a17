#pragma once

#include <string>

namespace vdcore::cuda {

// Why no kernel can run here, empty if one can. Starts no context.
std::string missing();

}  // namespace vdcore::cuda
