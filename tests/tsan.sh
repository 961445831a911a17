#!/bin/sh
# Builds the CPU engine with ThreadSanitizer into build/tsan, and calls it from several threads at once, on every
# instruction set of this machine. Nonzero on any report. The threads are the engine's own: ThreadSanitizer knows
# std::thread, and takes the waiting of an OpenMP runtime for races.
set -eu
cd "$(dirname "$0")/.."
build=build/tsan
mkdir -p build
if ! echo "int main() {}" | ${CXX:-c++} -x c++ -fsanitize=thread -o /dev/null - 2>/dev/null; then
  echo "skipped: ${CXX:-c++} has no ThreadSanitizer here (Debian: libtsan of its version)"
  exit 0
fi
cmake -S . -B "$build" -DVDCORE_SANITIZE=thread -DVDCORE_CUDA=OFF \
  -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >"$build.log" 2>&1 ||
  { cat "$build.log"; exit 1; }
cmake --build "$build" --target vdcore_tsan --parallel "${MAX_JOBS:-$(nproc)}"
for isa in $(python tests/asan_cases.py --instruction-sets); do
  VDCORE_CPU_ISA=$isa TSAN_OPTIONS=halt_on_error=1 "$build/vdcore_tsan"
done
