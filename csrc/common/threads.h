// Work shared among threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vdcore {

// Calls body(context, item) once for every item in [0, items), on up to `threads` threads, the calling one among them.
// Items are handed out one after another, so that uneven ones balance; which thread gets which is not defined.
// Safe after a fork and for concurrent callers. `body` must not throw.
void parallel_for(int64_t items, int threads, void (*body)(void* context, int64_t item), void* context);

// Memory of the calling thread, aligned to 64 bytes, kept for its next call; contents undefined.
char* scratch(size_t bytes);

}  // namespace vdcore
