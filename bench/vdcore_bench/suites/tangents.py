"""What a derivative along a direction costs: a Jacobian-vector product against forward alone, by torch.func.jvp.

Its time holds forward. With the tangent of q alone the engine takes three products of a tile of scores beside
forward's two, with all three five. Forward and both take part in one race.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore import FrameMask
from vdcore_bench.jobs import make
from vdcore_bench.jobs.base import DTYPES, Job
from vdcore_bench.measure.journal import Journal, Row, Watch
from vdcore_bench.measure.machine import seconds_text
from vdcore_bench.measure.timing import Contender, Spread, clock_for, race
from vdcore_bench.suites import Options, no_gpu
from vdcore_bench.suites.runner import LATE, blank
from vdcore_bench.workloads import Shape, load

TAKES = frozenset({"ops", "dtypes", "until"})
why_not = no_gpu
METRIC = "tangents"
WORKLOAD = "latte-1-512"
SHAPE = Shape(B=1, T=16, rows=8, columns=16, H=8, G=8, D=72, L=77)
CASES = (
    ("spatial_attention", None),
    ("temporal_attention", None),
    ("temporal_attention", FrameMask.causal()),
    ("video_attention", None),
    ("video_attention", FrameMask.causal()),
    ("cross_attention", None),
)
MODES = ("fwd", "jvp of q", "jvp of q, k, v")
HEADER = ("operator", "dtype", "forward", *(f"{mode} / forward" for mode in MODES[1:]))
ROUNDS = 9


def run(options: Options, journal: Journal, watch: Watch) -> None:
    chosen = [(op, mask) for op, mask in CASES if not options.ops or op in options.ops]
    jobs = [
        job_of(op, mask, DTYPES[name], options.device) for name in options.dtypes or ("float32",) for op, mask in chosen
    ]
    with watch.part("Time of tangents"):
        for number, job in enumerate(jobs):
            begin = len(journal.rows)
            watch.step(f"tangents of {job.op}", number, len(jobs))
            if time.monotonic() > options.until:
                journal.add([replace(blank(job), metric=METRIC, provider="all", status="skipped", reason=LATE)])
            else:
                journal.add(measure(job))
            watch.done(journal.rows[begin:])


def job_of(op: str, mask: FrameMask | None, dtype: torch.dtype, device: str, shape: Shape = SHAPE) -> Job:
    return make(op, load()[WORKLOAD], dtype=dtype, device=device, mask=mask or FrameMask(), shape=shape)


def ways(job: Job) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A mode of :data:`MODES`, and its call."""
    arguments = job.arguments(job.leaves())
    first = arguments.pop("q")
    qkv: tuple[Tensor, ...] = first.unbind(3) if first.ndim == 6 else (first, arguments.pop("k"), arguments.pop("v"))
    # They lie as their tensors do, of which a network makes them: torch copies others, into memory that it clears.
    whole = torch.randn_like(first)
    tangents = whole.unbind(3) if first.ndim == 6 else (whole, *map(torch.randn_like, qkv[1:]))
    public = getattr(vdcore, job.op)

    def of(*some: Tensor) -> Any:
        return public(*some, *qkv[len(some) :], **arguments)

    yield MODES[0], lambda: of(*qkv)
    yield MODES[1], lambda: torch.func.jvp(of, qkv[:1], tangents[:1])
    yield MODES[2], lambda: torch.func.jvp(of, qkv, tangents)


def measure(job: Job, rounds: int = ROUNDS) -> Iterator[Row]:
    """A row for each mode, from interleaved rounds."""
    base = replace(blank(job), metric=METRIC)
    clock = clock_for(job.device)
    with torch.no_grad():
        backend = vdcore.explain(job.op, **job.arguments(job.leaves()))[0][0]
        contenders = {mode: Contender(lambda _, call=call: call()) for mode, call in ways(job)}  # type: ignore[misc]
        race(contenders, dict.fromkeys(contenders, rounds), clock)
    for mode, contender in contenders.items():
        spread = Spread.of([sample.seconds for sample in contender.samples])
        yield replace(base.measured(spread, provider=f"vdcore[{backend}]", variant="auto"), mode=mode)


def cells(rows: Iterable[Row]) -> Sequence[tuple[str, ...]]:
    """Table rows as :data:`HEADER` names them."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row.metric == METRIC and row.p50:
            found.setdefault((row.op, row.case, row.dtype), {})[row.mode] = row
    made = []
    for (op, case, dtype), by_mode in found.items():
        forward = by_mode.get(MODES[0])
        if forward is None or not forward.p50:
            continue
        ratios = [f"{by_mode[mode].p50 / forward.p50:.2f}" if mode in by_mode else "-" for mode in MODES[1:]]  # type: ignore[operator]
        made.append((f"{op}, {case}", dtype, seconds_text(forward.p50), *ratios))
    return made
