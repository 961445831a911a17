// Division by a number that is known when a kernel is launched.
#pragma once

#include "common/tensor_view.h"

namespace vdcore::cuda {

// A multiplication and a shift in place of the division (Granlund and Montgomery 1994): exact for dividends below 2^31
// and divisors from 1 to 2^31.
struct Divider {
  uint32_t divisor = 1, multiplier = uint32_t{1} << 31, shift = 31;

  Divider() = default;
  explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)) {
    while ((int64_t{1} << (shift - 31)) < by) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);  // by > 2^(shift - 32)
  }

  VDCORE_INLINE uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
  // n becomes the quotient; the remainder.
  VDCORE_INLINE uint32_t split(uint32_t& n) const {
    const uint32_t whole = n;
    n = quotient(n);
    return whole - n * divisor;
  }
};

}  // namespace vdcore::cuda
