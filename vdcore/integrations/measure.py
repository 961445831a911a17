"""What a swap does to a whole model: which calls it serves, how far its results err, time, memory, and where time goes.

Every function takes models or calls of the host as they are, so that other hosts can be measured as well.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import vdcore


class AttentionCalls(TorchFunctionMode):
    """Counts the attention that is computed inside: torch's, by the length of queries and keys, and vdcore's."""

    def __init__(self) -> None:
        super().__init__()
        self.torch: Counter[tuple[int, int]] = Counter()
        self._before = vdcore.calls()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            self.torch[q.shape[-2], k.shape[-2]] += 1
        return func(*args, **kwargs)

    @property
    def served(self) -> int:
        """Calls of vdcore's attention operators since."""
        return sum(self.operators().values())

    def operators(self) -> Counter[str]:
        """The same by operator."""
        found: Counter[str] = Counter()
        for (op, _, direction), n in (vdcore.calls() - self._before).items():
            if op.endswith("attention") and direction == "fwd":
                found[op] += n
        return found


# ---- Time ----


class Spread(NamedTuple):
    """Seconds of one call: percentiles over the rounds."""

    p20: float
    p50: float
    p80: float


def race(calls: Mapping[str, Callable[[], Any]], *, rounds: int = 10, device: str = "cpu") -> dict[str, Spread]:
    """Times of several calls, their runs interleaved, after one run each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: Spread(*(_percentile(found, p) for p in (0.2, 0.5, 0.8))) for name, found in seconds.items()}


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _percentile(values: Sequence[float], p: float) -> float:
    return sorted(values)[min(int(p * len(values)), len(values) - 1)]


# ---- Memory ----


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most memory that a call takes beyond what is allocated before it, after one run that is not counted.

    On the CPU the highest resident size of the process, whoever allocates; needs Linux. On CUDA torch's allocator.
    """
    call()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _exact_heap():
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 0)


@contextmanager
def _exact_heap() -> Iterator[None]:
    """Inside, glibc gives every larger tensor a mapping of its own, back at once when it is freed.

    Otherwise what earlier calls left in the heap decides how far it grows. Times taken inside are those of page faults.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    except (OSError, AttributeError):
        yield
        return
    try:
        yield
    finally:
        usual = int(os.environ.get("MALLOC_MMAP_THRESHOLD_") or 1 << 25)
        libc.mallopt(_M_MMAP_THRESHOLD, min(usual, 2**31 - 1))


_M_MMAP_THRESHOLD = -3  # malloc.h


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"peak_bytes: /proc/self/status has no {field}")


def predicted_bytes(model: torch.nn.Module, call: Callable[[], Any]) -> int:
    """Peak memory of a call without running it: for a model and inputs of fake tensors, on any device.

    Both must have been made, and the call is made, inside one ``torch._subclasses.FakeTensorMode``. Counts tensors, the
    parameters included; what an operator takes inside of itself is not seen.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        call()
    peaks = tracker.get_tracker_snapshot("peak")
    return max(sum(sizes.values()) // 2 if "Total" in sizes else sum(sizes.values()) for sizes in peaks.values())


# ---- Where time goes ----

# Operators by what they are for; the first pattern that is part of an operator's name counts.
ACTIVATIONS = "activations"
_PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::convolution")
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("attention", "softmax")),
    ("matrix products", ("addmm", "::mm", "bmm", "baddbmm", "convolution", "linear", "matmul")),
    (ACTIVATIONS, ("gelu", "silu", "sigmoid", "tanh")),
    ("norms and modulation", ("norm", "modulate", "gate_residual", "rope", "var_mean", "rsqrt")),
    ("copies and permutes", ("copy", "clone", "contiguous", "cat", "stack", "repeat", "pad")),
)


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of one call by group of operators; ``around`` is what lies around the matrix products."""

    groups: dict[str, float]

    @property
    def around(self) -> float:
        """Attention, permutes, norms, modulation, residuals: all but matrix products and activations."""
        return sum(ms for name, ms in self.groups.items() if name not in ("matrix products", ACTIVATIONS))

    @property
    def total(self) -> float:
        return sum(self.groups.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {ms:.1f}" for name, ms in sorted(self.groups.items(), key=lambda x: -x[1]))


def breakdown(call: Callable[[], Any], *, rounds: int = 5) -> Breakdown:
    """Where the time of a call goes on the CPU, by torch's profiler: of the rounds, the one with the least in all.

    What an operator calls inside of itself counts as the operator: adding a bias belongs to the product. A product of
    the shape of an activation's result is the gate of a gated activation, and belongs to it.
    """
    from torch.profiler import ProfilerActivity, profile

    call()
    found: list[Breakdown] = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            call()
        events = profiler.events() or []
        activated = {str(e.input_shapes[0]) for e in events if _group(e.name) == ACTIVATIONS and e.input_shapes}
        groups = dict.fromkeys([*(name for name, _ in GROUPS), "element by element"], 0.0)
        for event in events:
            gates = event.name in ("aten::mul", "aten::mul_") and str(event.input_shapes[0]) in activated
            groups[ACTIVATIONS if gates else _group(_outermost(event))] += event.self_cpu_time_total / 1000
        found.append(Breakdown(groups))
    return min(found, key=lambda one: one.total)


def _outermost(event: Any) -> str:
    """The product that an event is part of, else its own name."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.rstrip("_") in _PRODUCTS:
            return parent.name
        parent = parent.cpu_parent
    return event.name


def _group(name: str) -> str:
    for group, patterns in GROUPS:
        if any(pattern in name for pattern in patterns):
            return group
    return "element by element"
