"""Compiling ahead for the benchmarks, and the sweep: rows of config tables measured against the one that is taken."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

import vdcore
from vdcore_bench import aot
from vdcore_bench.jobs import make
from vdcore_bench.jobs.base import Job
from vdcore_bench.measure.journal import SWEEP, Journal
from vdcore_bench.measure.judge import flat, incoming
from vdcore_bench.measure.timing import Contender, clock_for, race
from vdcore_bench.suites.gpu.child import Given, Steps
from vdcore_bench.suites.gpu.plan import items
from vdcore_bench.suites.operators import jobs
from vdcore_bench.suites.runner import first_line
from vdcore_bench.workloads import Budget, load

ROUNDS = 15


@dataclass(frozen=True)
class Target:
    """A config table, what is called to measure its rows, and the rows.

    Args:
        table: module in vdcore_kernels and name, ``"temporal_attention.forward.FORWARD"``.
        changes: of the row that is taken today; a number given as a float multiplies it.
    """

    table: str
    op: str
    workload: str
    mode: str
    changes: tuple[dict[str, Any], ...]

    @property
    def title(self) -> str:
        return f"{self.table}, {self.workload}, {self.mode}"


_VALUES = tuple({"warps": w, "values": v} for w in (2, 4, 8) for v in (0.5, 1.0, 2.0))
_TILES = tuple(
    {"m": m, "n": n, "warps": w, "stages": s}
    for m, n, w, s in ((64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2))
) + ({"m": 128, "n": 128, "warps": 8, "stages": 3}, {"m": 64, "n": 128, "warps": 4, "stages": 3})
_ROWS = tuple({"warps": w, "values": v} for w in (2, 4, 8) for v in (1.0, 2.0))
TARGETS = (
    *(
        Target(f"temporal_attention.{where}", "temporal_attention", workload, mode, _VALUES)
        for where, mode in (("forward.FORWARD", "fwd"), ("backward.BACKWARD", "bwd"))
        for workload in ("latte-1-512", "mochi-1-480p")
    ),
    *(
        Target(f"frame_attention.{where}", op, workload, mode, _TILES)
        for where, mode in (
            *(("forward.FORWARD", "fwd"), ("backward_queries.QUERIES", "bwd"), ("backward_keys.KEYS", "bwd")),
        )
        for op, workload in (("video_attention", "wan2.2-5b-704p"), ("spatial_attention", "stdit3-720p-102f"))
    ),
    Target("adaln.backward.BACKWARD_ROWS", "modulate", "wan2.2-5b-704p", "bwd", _ROWS),
    Target("qk_norm_rope.backward.BACKWARD_ROWS", "qk_norm_rope", "wan2.2-5b-704p", "bwd", _ROWS),
)


# ---- Compiling ahead ----


def compile_ahead(given: Given, journal: Journal) -> None:
    """Every kernel of the benchmarks and of the sweep into Triton's cache, on all cores; touches no GPU."""
    # Shapes as they are: what a card cuts them to changes few kernels.
    wanted, _ = jobs(items(given.dry), "meta", given.budget if given.dry else Budget.unlimited())
    launches = [launch for job in wanted for launch in aot.job_launches(job, given.arch)]
    for target in () if given.dry else TARGETS:
        job = _job(target, "meta", given)
        for row in candidates(target, job, given.arch):
            with forced(target.table, row):
                launches += aot.job_launches(job, given.arch)
    for record in aot.compile_launches([(given.arch, "benchmarks", launch) for launch in launches]):
        row = given.row(op="compile", provider="vdcore[triton]", mode="fwd+bwd", metric="tests", unit="tests")
        broken = record.registers == 0
        reason = record.problem or ""
        case = f"{record.kernel} ({record.config})"
        journal.add([replace(row, case=case, status="failed" if broken else "ok", reason=reason)])


# ---- Rows of tables ----


def _table(name: str) -> tuple[Any, str]:
    module, _, attribute = name.rpartition(".")
    return importlib.import_module(f"vdcore_kernels.{module}"), attribute


@contextmanager
def forced(table: str, row: Any) -> Iterator[None]:
    """The table has this row, and takes it; also in backward."""
    from vdcore_kernels.core.launch import force

    module, name = _table(table)
    before = getattr(module, name)
    setattr(module, name, (row, *(other for other in before if other != row)))
    try:
        with force(row):
            yield
    finally:
        setattr(module, name, before)


def candidates(target: Target, job: Job, arch: str) -> list[Any]:
    """The row that the table has for the job, first, and its changes."""
    table = getattr(*_table(target.table))
    taken = [launch.config for launch in aot.job_launches(job, arch) if launch.config in table]
    if not taken:
        return []
    rows = [taken[0]]
    for change in target.changes:
        known = {f.name for f in fields(taken[0])}
        new: dict[str, Any] = {"why": "swept"}
        for name, value in change.items():
            if name in known:
                new[name] = int(value * getattr(taken[0], name)) if isinstance(value, float) else value
        row = replace(taken[0], **new)
        same = [_numbers(row) == _numbers(other) for other in rows]
        if not any(same):
            rows.append(row)
    return rows


def _numbers(row: Any) -> tuple[Any, ...]:
    return tuple(getattr(row, f.name) for f in fields(row) if f.name not in ("why", "arch"))


def _job(target: Target, device: str, given: Given) -> Job:
    mode = "fwd" if target.mode == "fwd" else "fwd+bwd"
    budget = given.budget if given.dry else None
    options: dict[str, Any] = {"mode": mode, "dtype": torch.bfloat16, "device": device}
    found: Job = make(target.op, load()[target.workload], budget=budget, **options)
    return found


# ---- The sweep ----


def sweep(given: Given, journal: Journal) -> None:
    """A race of every target's rows: all are called once, which compiles, and then run in interleaved rounds."""
    targets = TARGETS[::4] if given.dry else TARGETS
    for target in Steps(given, journal)(targets, lambda target: target.title):
        _sweep_one(target, given, journal)


def _sweep_one(target: Target, given: Given, journal: Journal) -> None:
    job, clock = _job(target, given.device, given), clock_for(given.device)
    rows = candidates(target, _job(target, "meta", given), given.arch)[: 3 if given.dry else None]
    base = given.row(op=target.op, workload=target.workload, mode=target.mode, case=SWEEP + target.table)
    tensors, contenders = job.leaves(), {}
    for row in rows:
        text = aot.config_text(row)
        line = replace(base, provider="table" if row is rows[0] else "swept", variant=text, shape=job.shape.sizes())
        try:
            contender = _contender(target, job, tensors, row)
            contender.run(clock)
            contenders[text] = (line, contender)
        except Exception as error:
            journal.add([replace(line, status="failed", reason=first_line(error))])
    race({text: c for text, (_, c) in contenders.items()}, dict.fromkeys(contenders, 3 if given.dry else ROUNDS), clock)
    journal.add(line.measured(c.spread) for line, c in contenders.values())


def _contender(target: Target, job: Job, tensors: dict[str, Any], row: Any) -> Contender:
    function: Callable[..., Any] = getattr(vdcore, job.op)
    leaves = [tensors[name] for name in job.learned] if job.has_backward else []

    def forward() -> Sequence[torch.Tensor]:
        with forced(target.table, row), torch.set_grad_enabled(bool(leaves)):
            return flat(function(**job.arguments(tensors), backend="triton"))

    if not leaves:
        return Contender(lambda _: forward())
    dout = incoming(list(forward()))

    def backward(outputs: Sequence[torch.Tensor]) -> Any:
        with forced(target.table, row):
            return torch.autograd.grad(outputs, leaves, dout, allow_unused=True)

    return Contender(backward, prepare=forward)
