"""A VDiT whose frames several processes share: bytes that each sends, its peak memory and its time, against ranks.

Bytes are those of the messages that pass, and memory that of the tensors which torch makes: both counted on processes
of this machine over gloo, one thread each, and the same on any other. Time is this machine's; where it has fewer
processors than there are ranks, it says little. So a time is predicted too, for a link of a given speed: a rank's share
of the time that one process takes, and its bytes over the link one after the other, with no overlap.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vdcore.models import VDiT
from vdcore.parallel import Allocations, Traffic, shard
from vdcore.parallel.plan import Layer, choose
from vdcore.parallel.world import WorldError, run_ranks
from vdcore_bench.measure.journal import Journal, Row, Watch, row_here
from vdcore_bench.measure.machine import bytes_text, seconds_text
from vdcore_bench.measure.timing import Spread
from vdcore_bench.suites.models.vdit import SIZE, ModelPoint

OP = "vdit on ranks"
STEPS = 3  # that are timed
HEADER = ("model", "mode", "dtype", "frames", "ranks", "plan", "sent per rank", "memory per rank", "time", "predicted")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        ranks: numbers of processes; 1 is added, which predictions are made from.
        plan: of attention across frames; None: each model's own.
        link: bytes per second that a rank sends; None: nothing is predicted.
        timeout: seconds of one point.
    """

    ranks: tuple[int, ...] = (1, 2, 4)
    frames: tuple[int, ...] = (16,)
    mode: str = "fwd+bwd"
    dtype: torch.dtype = torch.float32
    plan: str | None = None
    link: float | None = None
    timeout: float = 300.0


@dataclass(frozen=True)
class Found:
    """Of one rank: bytes sent and held at once, and the seconds of each step."""

    sent: int
    peak: int
    seconds: list[float]


def step_of(mesh: Any, point: ModelPoint, plan: str | None) -> tuple[VDiT, Callable[[], Any]]:
    """The model, whose parameters have their gradients already, and a step on this rank's frames."""
    torch.manual_seed(0)
    model = VDiT(point.config, mesh=mesh, plan=plan if mesh.size() > 1 else None).to(point.dtype)
    video = torch.randn(1, point.frames, SIZE[0], *SIZE[1:]).to(point.dtype)
    part, timestep = shard(video, mesh).transpose(1, 2).contiguous(), torch.full((1,), 500.0)

    def forward() -> Any:
        with torch.no_grad():
            return model(part, timestep, frames=point.frames)

    def backward() -> Any:
        model(part, timestep, frames=point.frames).float().sum().backward()

    return model, backward if "bwd" in point.mode else forward


def work(mesh: Any, point: ModelPoint, plan: str | None) -> Found:
    """What one rank finds."""
    _, step = step_of(mesh, point, plan)
    step()
    with Allocations() as allocations:
        step()
    with Traffic(mesh.get_local_rank()) as traffic:
        step()
    seconds = []
    for _ in range(STEPS):
        torch.distributed.barrier()
        begin = time.perf_counter()
        step()
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - begin)
    return Found(traffic.bytes, allocations.peak, seconds)


def plan_of(point: ModelPoint, ranks: int, plan: str | None) -> str:
    """The plan that the model takes."""
    from vdcore.models.vdit import ways

    if ranks == 1:
        return "-"
    c = point.config
    size = torch.empty(0, dtype=point.dtype).element_size()
    layer = Layer(1, point.frames, point.tokens, c.heads, c.kv_heads or c.heads, c.head_dim, size, c.frame_mask)
    return choose("profile", plan, layer, ranks, ways(c))


def run(variants: Sequence[str], settings: Settings, journal: Journal, watch: Watch) -> None:
    """Rows of every variant, number of frames and of ranks, in the journal as soon as they exist."""
    counts = tuple(sorted({1, *settings.ranks}))
    points = [
        ModelPoint(name, "vdcore", frames, settings.mode, settings.dtype)
        for name in variants
        for frames in sorted(settings.frames)
    ]
    with watch.part("Models on several ranks"):
        for i, point in enumerate(points):
            alone = 0.0
            for j, ranks in enumerate(counts):
                what = f"{point.variant}, {point.frames} frames, {ranks} ranks"
                watch.step(what, i * len(counts) + j, len(points) * len(counts))
                rows = measure(point, ranks, settings, alone)
                alone = alone or next((r.p50 or 0.0 for r in rows if r.metric == "time" and r.status == "ok"), 0.0)
                journal.add(rows)
                watch.done(rows)


def measure(point: ModelPoint, ranks: int, settings: Settings, alone: float) -> list[Row]:
    """Rows of one world: bytes sent and memory of the rank with most, time of the slowest, and a prediction.

    Args:
        alone: seconds of one process; 0: unknown.
    """
    plan = plan_of(point, ranks, settings.plan)
    base = base_row(point, ranks, plan)
    sent, memory = (replace(base, metric=name, unit="bytes") for name in ("sent", "memory"))
    try:
        found = run_ranks(work, ranks, point, settings.plan, timeout=settings.timeout)
    except WorldError as error:
        reason = str(error).strip().splitlines()[-1][:300]
        return [replace(row, status="failed", reason=reason) for row in (sent, memory, base)]
    most = max(f.sent for f in found)
    slowest = [max(seconds) for seconds in zip(*(f.seconds for f in found))]
    crowded = ranks > (os.cpu_count() or 1)
    rows = [
        sent.measured(Spread.of([float(most)])),
        memory.measured(Spread.of([float(max(f.peak for f in found))]), reason="counted over torch's tensors"),
        base.measured(Spread.of(slowest), reason="more ranks than processors" if crowded else ""),
    ]
    if settings.link and alone and ranks > 1:
        reason = f"{seconds_text(alone)} / {ranks} + {bytes_text(most)} at {settings.link / 1e9:g} GB/s, no overlap"
        rows.append(
            replace(
                base, metric="predicted", status="predicted", p50=alone / ranks + most / settings.link, reason=reason
            )
        )
    return rows


def base_row(point: ModelPoint, ranks: int, plan: str) -> Row:
    """Everything but the numbers."""
    row = row_here(
        "cpu",
        point.dtype,
        op=OP,
        workload=point.variant,
        provider="vdcore",
        variant=plan,
        mode=point.mode,
        case=f"{ranks} ranks",
        x=point.frames,
        flops=point.flops() / ranks,
        shape={"T": point.frames, "S": point.tokens, "ranks": ranks},
    )
    return replace(row, threads=1)


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Table rows as :data:`HEADER` names them."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row.op == OP:
            key = (row.workload, row.mode, row.dtype, f"{row.x:g}", str(row.shape["ranks"]), row.variant)
            found.setdefault(key, {})[row.metric] = row

    def text(row: Row | None, show: Callable[[float], str]) -> str:
        if row is None:
            return "-"
        return row.status if row.p50 is None else ("~" if row.status == "predicted" else "") + show(row.p50)

    columns = (("sent", bytes_text), ("memory", bytes_text), ("time", seconds_text), ("predicted", seconds_text))
    return [(*key, *(text(metrics.get(name), show) for name, show in columns)) for key, metrics in found.items()]
