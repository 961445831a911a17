// Switching between fibers. ucontext makes a system call each time; a kernel switches a million times.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
extern "C" void vdcore_switch_fiber(void** save, void* load);
#else
#include <ucontext.h>
#endif

namespace vdcore::cuda::emulator {

constexpr size_t kStack = 256 << 10;  // of a fiber; pages that are never touched cost nothing

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
inline void switch_to(Context& from, Context& to) { vdcore_switch_fiber(&from.stack_pointer, to.stack_pointer); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + kStack) & ~uintptr_t{15});
  top[-1] = nullptr;  // entry() never returns
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // the six registers
  context.stack_pointer = top - 8;
}
#else
using Context = ucontext_t;
inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

}  // namespace vdcore::cuda::emulator
