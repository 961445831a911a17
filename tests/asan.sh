#!/bin/sh
# Builds the CPU engine with AddressSanitizer and UndefinedBehaviorSanitizer into build/asan, and runs every case on it,
# forward and backward, in every layout and dtype, on every instruction set of this machine. Nonzero on any report.
#
# Tensors come from malloc, which the preloaded runtime replaces: one element past their end is an error. Leaks are not
# looked for, Python and torch keep memory until the process ends.
set -eu
cd "$(dirname "$0")/.."
build=build/asan
mkdir -p build
cmake -S . -B "$build" -DVDCORE_SANITIZE=address,undefined -DVDCORE_CUDA=OFF \
  -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >"$build.log" 2>&1 ||
  { cat "$build.log"; exit 1; }
cmake --build "$build" --target _native --parallel "${MAX_JOBS:-$(nproc)}"

compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")
for isa in $(python tests/asan_cases.py --instruction-sets); do
  echo "== $isa"
  VDCORE_CPU_ISA=$isa PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
    LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)" \
    python tests/asan_cases.py "$build"
done
