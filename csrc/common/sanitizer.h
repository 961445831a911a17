// Memory that AddressSanitizer is told not to let anybody touch; nothing in other builds.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define VDCORE_POISON(at, bytes) __asan_poison_memory_region(at, bytes)
#define VDCORE_UNPOISON(at, bytes) __asan_unpoison_memory_region(at, bytes)
#else
#define VDCORE_POISON(at, bytes) static_cast<void>(0)
#define VDCORE_UNPOISON(at, bytes) static_cast<void>(0)
#endif
