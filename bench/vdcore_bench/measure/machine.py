"""The machine under a measurement: what goes into every row, and the allocator that benchmarks need."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch

import vdcore
from vdcore.ops.native import missing as why_no_native
from vdcore.ops.native import native

# With glibc's defaults a tensor over 32 MB is a fresh mapping at every allocation, and its page faults take longer than
# the kernel that fills it.
RAISED = {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
ADVICE = " ".join(f"{name}={value}" for name, value in RAISED.items())

NO_GPU = 2**50  # bytes: jobs for a GPU that is not there are only described, at their full size

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_MMAP_THRESHOLD = 32 * 2**20  # where glibc moves it by itself
DEFAULT_THRESHOLDS = "glibc, default thresholds"
_PRELOADED = ("tcmalloc", "jemalloc", "mimalloc")


def allocator() -> str:
    """The C allocator of this process and its setting, in words."""
    for name in _PRELOADED:
        if name in os.environ.get("LD_PRELOAD", ""):
            return name
    libc = platform.libc_ver()[0] or f"the C library of {platform.system()}"
    if libc != "glibc":
        return libc
    raised = all(os.environ.get(name) == value for name, value in RAISED.items())
    return "glibc, thresholds raised" if raised else DEFAULT_THRESHOLDS


def needs_relaunch() -> bool:
    """Freed memory would go back to the system, and an environment variable can prevent that."""
    return allocator() == DEFAULT_THRESHOLDS


def command(arguments: Iterable[str]) -> list[str]:
    """``vdcore`` with these arguments, in this Python."""
    return [sys.executable, "-m", "vdcore.cli", *arguments]


def relaunch(arguments: Iterable[str]) -> int:
    """Runs ``vdcore`` with these arguments in a child whose allocator keeps its memory; returns its exit code."""
    child = subprocess.Popen(command(arguments), env={**os.environ, **RAISED})
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the terminal sends it to the child as well, which finishes its files
            continue


@contextlib.contextmanager
def returning_memory() -> Iterator[None]:
    """Inside, glibc hands freed memory back to the system, so that a resident size means memory in use.

    Times that are taken inside are those of page faults. What is measured inside should be allocated and called once
    inside as well (this is a decorator too): space that was freed before lies scattered, and is taken before new space.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)

    def set_thresholds(size: int) -> None:
        libc.mallopt(_M_MMAP_THRESHOLD, size)
        libc.mallopt(_M_TRIM_THRESHOLD, size)

    set_thresholds(128 * 1024)
    libc.malloc_trim(0)
    try:
        yield
    finally:
        set_thresholds(_MOST_MMAP_THRESHOLD if needs_relaunch() else 2**31 - 1)


_heap = 0


def touch_heap(size: int) -> None:
    """Touches memory and frees it, for the outputs of all calls to come.

    Raised thresholds alone are not enough: outputs of one size do not fit into one another's place once a small
    allocation has taken the beginning, and then every call grows the heap by fresh pages.
    """
    global _heap
    if allocator().endswith("thresholds raised") and size > _heap:
        torch.empty(size, dtype=torch.uint8).fill_(0)
        _heap = size


def heap() -> str:
    """The allocator and what was done for it, as rows say it."""
    return allocator() + (f", {bytes_text(_heap)} touched" if _heap else "")


def version_of(package: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_isa() -> str:
    """The instruction set that the native kernels use here; torch's, if they are not installed."""
    if why_no_native() is None:
        return str(native().cpu_isa())
    return torch.backends.cpu.get_cpu_capability()


def gpu_model() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def commit() -> str | None:
    """The commit that vdcore runs from, with ``-dirty`` after changes; None outside a checkout."""
    root = Path(vdcore.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()
            for args in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if changes else "")


@cache
def versions() -> dict[str, str | None]:
    """What the numbers depend on: software, processor and GPU."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "vdcore": vdcore.__version__,
        "os": platform.system(),
        "cpu": cpu_model(),
        "isa": cpu_isa(),
        "gpu": gpu_model(),
        "cuda": torch.version.cuda,
    }


def available_memory(device: str = "cpu") -> int:
    """Bytes that new allocations can have: free memory of the GPU, or of the machine and of the container around us."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) if torch.cuda.is_available() else NO_GPU
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            free = min(free, int(most) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(free, 0)


def memory_limit(device: str = "cpu") -> int:
    """What a benchmark may take: the available memory without a tenth of it, at least 1 GiB, for all else."""
    free = available_memory(device)
    return max(free - max(free // 10, 2**30), 0)


class Load:
    """How busy other processes keep the processors, from its making on.

    Attributes:
        average: the load average of the minute before, which nothing of ours is in; None where the system has none.
    """

    def __init__(self) -> None:
        self.average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self._begin = self._clocks()

    @staticmethod
    def _clocks() -> tuple[float, float, float]:
        """Seconds: passed; of processors that others used; of processors that the hypervisor gave away."""
        import psutil

        used, me = psutil.cpu_times(), psutil.Process()
        stolen = getattr(used, "steal", 0.0)
        idle = ("idle", "iowait", "steal", "guest", "guest_nice")  # a guest's time is in user already
        others = sum(t for name, t in used._asdict().items() if name not in idle)
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended: its parent has its time
                others -= sum(process.cpu_times()[:4])  # with children that were waited for
        return time.monotonic(), others, stolen

    def so_far(self) -> tuple[float, float]:
        """Processors that others used, and that were stolen, on average."""
        seconds, others, stolen = (now - then for now, then in zip(self._clocks(), self._begin))
        return max(others / max(seconds, 1e-9), 0.0), stolen / max(seconds, 1e-9)


def bytes_text(n: float) -> str:
    """``1536 -> '1.5 KiB'``."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:,.3g} GiB" if n < 1000 else f"{n:,.0f} GiB"


def seconds_unit(s: float) -> tuple[float, str]:
    """The unit that fits, and how many of it are a second."""
    units = ((1.0, "s"), (1e3, "ms"), (1e6, "us"))
    return next(((factor, unit) for factor, unit in units if s * factor >= 1), (1e9, "ns"))


def seconds_text(s: float) -> str:
    """Three digits in the unit that fits: ``0.0123 -> '12.3 ms'``."""
    factor, unit = seconds_unit(s)
    return f"{s * factor:.3g} {unit}"
