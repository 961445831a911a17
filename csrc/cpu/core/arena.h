// A thread's scratch memory, shared out among the tiles of a kernel.
#pragma once

#include "common/sanitizer.h"
#include "cpu/core/vec.h"

namespace vdcore::cpu::VDCORE_ISA {

// Scratch memory, handed out piece by piece. With no memory it only counts.
class Arena {
 public:
  explicit Arena(char* memory) : base_(memory) {}
  float* floats(int64_t n) {
    char* at = base_ ? base_ + used_ : nullptr;
    const size_t bytes = static_cast<size_t>(n) * 4;
    const size_t room = (bytes + 63) / 64 * 64 + 64;  // the gap keeps equal tiles out of one another's cache sets
    if (at) VDCORE_POISON(at + bytes, room - bytes);
    used_ += room;
    return reinterpret_cast<float*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace vdcore::cpu::VDCORE_ISA
