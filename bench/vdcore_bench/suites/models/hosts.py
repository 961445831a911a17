"""Blocks of diffusers' models before and after the swap: their time, peak memory and error as rows of results.

Peers are the host as it comes, whose attention is torch's SDPA, and the host with SDPA kept from its fused kernels,
which is naive attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vdcore.testing import error_ratio
from vdcore_bench.jobs.base import DTYPE_NAMES
from vdcore_bench.measure import machine
from vdcore_bench.measure.float64 import Float64
from vdcore_bench.measure.journal import PROFILE, Journal, Row
from vdcore_bench.measure.machine import heap
from vdcore_bench.measure.memory import Peak, Timed, peak_of, predicted_peak, time_warm
from vdcore_bench.measure.timing import Spread, race_calls
from vdcore_bench.suites.sweep import Estimate, Settings, cannot, follow, rows_of

if TYPE_CHECKING:
    from vdcore.integrations.diffusers import Report
    from vdcore_bench.suites.models.host_blocks import Block

PROVIDERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "diffusers": nullcontext,
    "diffusers, naive attention": partial(sdpa_kernel, SDPBackend.MATH),
    "vdcore": nullcontext,
}


def models() -> list[str]:
    """Models by which their blocks may be called."""
    return [name.split()[0] for name in blocks()]


def blocks() -> list[str]:
    """Blocks of real width."""
    from vdcore_bench.suites.models.host_blocks import BLOCKS

    return list(BLOCKS)


class Host(NamedTuple):
    """A block, a call of it without gradients, and what the swap says of it, where there was one."""

    module: nn.Module
    call: Callable[[], Tensor]
    report: Report | None


@dataclass(frozen=True)
class HostPoint:
    """A block, and who computes it.

    Args:
        name: of the block, or of its model.
        frames: None: those that a small machine can take.
        dtype: of weights and inputs.
        grid: rows and columns of tokens; None: as the frames.
    """

    name: str
    provider: str = "diffusers"
    frames: int | None = None
    dtype: torch.dtype = torch.float32
    grid: tuple[int, int] | None = None

    def make(self, wide: bool = False) -> Host:
        """
        Args:
            wide: in float64, with weights and inputs that are still those of ``dtype``.
        """
        from vdcore.integrations.diffusers import swap_in

        module, run = self.build(wide)
        report = swap_in(module) if self.provider == "vdcore" else None

        def call() -> Tensor:
            with torch.no_grad(), PROVIDERS[self.provider]():
                return run()

        return Host(module, call, report)

    def build(self, wide: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
        """The host's module, and what calls it, before or after the swap."""
        block = self.block
        torch.manual_seed(0)
        module, inputs = block.build().eval(), block.inputs(*self.size())
        for dtype in (self.dtype, torch.float64) if wide else (self.dtype,):
            if next(module.parameters()).dtype != dtype:
                module = nn.Module.to(module, dtype)
            inputs = _cast(inputs, dtype)
        return module, partial(block.ours if self.provider == "vdcore" else block.host, module, inputs)

    @property
    def block(self) -> Block:
        from vdcore_bench.suites.models.host_blocks import BLOCKS

        return BLOCKS[self.full_name]

    @property
    def full_name(self) -> str:
        return next(name for name in blocks() if name == self.name or name.split()[0] == self.name)

    def size(self) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens."""
        T, *grid = self.block.small
        H, W = grid if self.grid is None else self.grid
        return (T if self.frames is None else self.frames, H, W)

    def row(self) -> Row:
        """Everything but the numbers."""
        shape = dict(zip("THW", self.size()))
        return Row(
            op="block",
            workload=self.full_name,
            provider=self.provider,
            mode="fwd",
            case="real width, random weights",
            x=shape["T"],
            dtype=DTYPE_NAMES[self.dtype],
            threads=torch.get_num_threads(),
            allocator=heap(),
            original=shape,
            shape=shape,
            versions=machine.versions(),
            commit=machine.commit(),
        )


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, tuple):
        return tuple(_cast(y, dtype) for y in x)
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def exact(point: HostPoint) -> Tensor:
    """The result with every operation in float64."""
    with Float64():
        return point.make(wide=True).call()


def predict_memory(point: HostPoint) -> int:
    """Peak bytes of a call beyond parameters and inputs, by running it on fake tensors: nothing is computed."""
    from torch._subclasses import FakeTensorMode

    usual = torch.get_default_dtype()
    torch.set_default_dtype(point.dtype)  # fake modules cannot be cast
    try:
        with FakeTensorMode():
            host = point.make()
            return predicted_peak(host.module, host.call)
    finally:
        torch.set_default_dtype(usual)


@machine.returning_memory()
def measure_memory(point: HostPoint) -> Peak:
    """Of one call beyond parameters and inputs. For a fresh process."""
    call = point.make().call
    call()  # starts threads and loads code
    return peak_of(call)


def measure_time(point: HostPoint, need: int) -> Timed:
    """Of warm calls. For a fresh process."""
    return time_warm(point.make().call, "cpu", need)


# ---- bench --model ----


def compare(name: str, dtypes: Sequence[torch.dtype], rounds: int, journal: Journal) -> list[Row]:
    """Time in interleaved rounds, peak memory and error of all providers; rows go to the journal."""
    begin = len(journal.rows)
    for dtype in dtypes:
        points = {provider: HostPoint(name, provider, dtype=dtype) for provider in PROVIDERS}
        reference = exact(points["diffusers"])
        calls = {provider: point.make().call for provider, point in points.items()}
        results = {provider: call() for provider, call in calls.items()}
        spreads = race_calls(calls, rounds)
        for provider, point in points.items():
            row = point.row()
            ratio = error_ratio(results[provider], reference, [results["diffusers"]]).worst
            peak = float(peak_of(calls[provider]).bytes)
            memory = replace(row, metric="memory", unit="bytes").measured(Spread.of([peak]))
            journal.add([row.measured(spreads[provider], error_ratio=ratio), memory])
    return journal.rows[begin:]


HEADER = ("model", "dtype", "who", "time", "peak memory", "error")


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line a provider, for a table."""
    lines: list[tuple[str, ...]] = []
    for timed, memory in zip(rows[::2], rows[1::2]):
        numbers = machine.seconds_text(timed.p50 or 0.0), machine.bytes_text(memory.p50 or 0.0)
        lines.append((timed.workload, timed.dtype, timed.provider, *numbers, f"{timed.error_ratio:.2f}"))
    return lines


# ---- profile --model ----


def profile(
    name: str,
    settings: Settings,
    journal: Journal,
    watch: Callable[[str, int, int], None] = lambda what, number, total: None,
) -> list[Row]:
    """A block of real width against frames: measured in processes of their own, or predicted where it would not fit."""
    begin, providers = len(journal.rows), ("diffusers", "vdcore")
    follow(
        [[HostPoint(name, who, n, settings.dtype) for n in sorted(set(settings.frames))] for who in providers],
        lambda point, rate: _profile_rows(point, settings, rate),
        lambda point: point.size()[0],
        journal,
        lambda p, number, total: watch(f"{p.name}, {p.provider}, {p.frames} frames", number, total),
    )
    return journal.rows[begin:]


def _profile_rows(point: HostPoint, settings: Settings, rate: float) -> list[Row]:
    base = _with_heads(point)
    try:
        need = predict_memory(point)
    except Exception as error:  # the host's own: more frames than its table of positions has, say
        return cannot(base, error)
    return rows_of(
        base,
        Estimate(need, "by a run on fake tensors", point.size()[0] / rate if rate else 0.0),
        settings,
        partial(measure_memory, point),
        partial(measure_time, point),
        note=f"predicted {machine.bytes_text(need)}",
    )


def _with_heads(point: HostPoint) -> Row:
    """The row with what the profile's tables say of a shape, asked of the block's first attention."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        attn: Any = next(m for m in point.block.build().modules() if hasattr(m, "to_q"))
    T, rows, columns = point.size()
    shape = {"B": 1, "T": T, "S": rows * columns, "H": attn.heads, "D": attn.to_q.out_features // attn.heads}
    return replace(point.row(), case=f"{PROFILE}one block", original=shape, shape=shape)
