"""Threads of the engine come from the OpenMP runtime that torch's come from, also where another one is preloaded."""

import os
import shutil
import subprocess
import sys

import pytest

from vdcore.ops.native import missing as why_no_native

# A runtime in front of torch's own, as LD_PRELOAD puts libiomp5 or another libgomp there. It counts parallel regions.
RUNTIME = """
#define _GNU_SOURCE
#include <dlfcn.h>
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
static int regions;
int counted_regions(void) { return regions; }
void GOMP_parallel(void (*body)(void *), void *context, unsigned threads, unsigned flags) {
  __sync_fetch_and_add(&regions, 1);
  ((Parallel)dlsym(RTLD_NEXT, "GOMP_parallel"))(body, context, threads, flags);
}
"""
CODE = """
import ctypes, os, torch, vdcore
count = ctypes.CDLL(None).counted_regions
tasks = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
x = torch.randn(1 << 20)
(x + x).sum()
by_torch, threads = count(), tasks()
assert by_torch > 0, "torch does not use what is preloaded"
q = torch.randn(1, 8, 600, 4, 64)
vdcore.temporal_attention(q, q, q, backend="cpu")
print(count() - by_torch, tasks() - threads)
"""


@pytest.mark.skipif(why_no_native() is not None, reason=str(why_no_native()))
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_a_preloaded_runtime_is_the_one(tmp_path):
    source, library = tmp_path / "runtime.c", tmp_path / "runtime.so"
    source.write_text(RUNTIME)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "3"}
    found = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    regions, threads = map(int, found.stdout.split())
    assert regions == 1 and threads == 0
