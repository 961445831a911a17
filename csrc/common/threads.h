// Work shared among threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vdcore {

// Calls body(context, item) once for every item in [0, items), on up to `threads` threads, the calling one among them.
// Items are handed out one after another, so that uneven ones balance; which thread gets which is not defined.
// Safe after a fork and for concurrent callers. `body` must not throw.
void parallel_for(int64_t items, int threads, void (*body)(void* context, int64_t item), void* context);

// Waits until a number that another thread stores with release semantics is at least this: soon, as a rule.
void wait_until(const int64_t* number, int64_t least);

// From now on parallel_for() takes its threads from the OpenMP runtime that the shared library at `path` is linked to.
// After its own parallel work a runtime's threads keep a processor busy for a while, waiting for more: threads of ours
// would have to share it with them. False where there is no such library or runtime: then they are our own, as they are
// in a forked child, where a runtime's threads are gone and it does not know.
bool share_openmp(const char* path);

// Memory of the calling thread, aligned to 64 bytes, kept for its next call; contents undefined.
char* scratch(size_t bytes);

}  // namespace vdcore
