"""What a library must not do to its process: hazard 21, threads, forks, the GIL, imports."""

import threading
import time

import torch
from support import run_python

import vdcore


def test_denormals_survive():
    code = """
import vdcore, torch
q = torch.randn(1, 4, 3, 2, 16)
vdcore.temporal_attention(q, q, q, backend="cpu")
x = 1e-310
assert x / 10 != 0 and 1e-323 != 0
assert (torch.tensor([1e-40]) * 1).item() != 0
print("fine")
"""
    assert run_python(code).strip() == "fine"


def test_eight_threads_make_the_first_call():
    code = """
import threading, torch, vdcore
q, k, v = (torch.randn(1, 8, 500, 4, 32) for _ in range(3))
barrier, results = threading.Barrier(8), [None] * 8
def work(i):
    barrier.wait()
    results[i] = vdcore.temporal_attention(q, k, v)
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert all(torch.equal(results[0], r) for r in results)
print("fine")
"""
    assert run_python(code).strip() == "fine"


def test_survives_a_fork():
    """A forked child, and its child, call with threads of their own. (torch's own operators may not: libgomp hangs.)"""
    code = """
import os, torch, vdcore
q, k, v = (torch.randn(1, 8, 2000, 4, 32) for _ in range(3))
def bits():
    return vdcore.temporal_attention(q, k, v, backend="cpu").numpy().tobytes()
expected = bits()     # the parent's threads exist now
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        right = bits() == expected
        pid = os.fork()
        if pid == 0:
            os._exit(0 if bits() == expected else 4)
        os._exit(0 if right and os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert bits() == expected
print("fine")
"""
    assert run_python(code, timeout=60).strip() == "fine"


def test_dataloader_workers():
    code = """
import torch, vdcore
class Clips(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, i):
        q = torch.full((1, 8, 400, 4, 32), float(i))
        return vdcore.temporal_attention(q, q, q, backend="cpu")
if __name__ == "__main__":
    q = torch.randn(1, 8, 2000, 4, 32)
    vdcore.temporal_attention(q, q, q, backend="cpu")
    for i, x in enumerate(torch.utils.data.DataLoader(Clips(), num_workers=2, batch_size=None)):
        torch.testing.assert_close(x, torch.full_like(x, float(i)))
    print("fine")
"""
    assert run_python(code, timeout=120).strip() == "fine"


def test_the_gil_is_released():
    """Python goes on in another thread while a long call computes."""
    q, k, v = (torch.randn(1, 24, 4000, 8, 64) for _ in range(3))
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    vdcore.temporal_attention(q, k, v, backend="cpu")
    before = ticks[0]
    vdcore.temporal_attention(q, k, v, backend="cpu")
    during = ticks[0] - before
    stop.set()
    thread.join()
    assert during > 3


def test_follows_torchs_number_of_threads():
    code = """
import os, threading, torch, vdcore
torch.set_num_threads(1)
q = torch.randn(1, 16, 2000, 4, 32)
vdcore.temporal_attention(q, q, q, backend="cpu")
def native(): return len(os.listdir("/proc/self/task"))
alone = native()
torch.set_num_threads(3)
vdcore.temporal_attention(q, q, q, backend="cpu")
assert native() == alone + 2, (alone, native())
vdcore.temporal_attention(q, q, q, backend="cpu")
assert native() == alone + 2
print("fine")
"""
    assert run_python(code).strip() == "fine"


def test_import_is_light():
    """`import vdcore` needs neither triton nor diffusers, touches no GPU, and takes little beyond torch."""
    code = """
import sys, time
import torch
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "diffusers", "rich", "typer", "matplotlib"):
            raise ImportError("not installed")
sys.meta_path.insert(0, Forbidden())
import vdcore
q = torch.randn(1, 4, 3, 2, 16)
vdcore.temporal_attention(q, q, q)
assert not {"triton", "diffusers", "rich", "typer", "matplotlib"} & {m.split(".")[0] for m in sys.modules}
assert not torch.cuda.is_initialized()
print("fine")
"""
    assert run_python(code, TRITON_INTERPRET="").strip() == "fine"


def test_works_without_the_compiled_module():
    """A machine where nothing was compiled still computes, and says what is missing."""
    code = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name == "vdcore._native":
            raise ImportError("no compiler was there")
sys.meta_path.insert(0, Forbidden())
import torch, vdcore
assert "compiled module" in vdcore.backends()["cpu"]
q = torch.randn(1, 4, 3, 2, 16, requires_grad=True)
vdcore.temporal_attention(q, q, q).sum().backward()
try:
    vdcore.temporal_attention(q, q, q, backend="cpu")
except vdcore.BackendError as error:
    assert "compiled module" in str(error)
    print("fine")
"""
    assert run_python(code).strip() == "fine"
