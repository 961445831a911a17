"""Runs jobs: every provider warmed up, judged and raced; every row written as soon as it exists.

When compiled peers join a job that was measured before, ours, the copy and all that took at most twice the time of the
fastest peer run again in interleaved rounds with them. The later race counts: ours is compared with no one outside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore_bench import stub
from vdcore_bench.jobs.base import Job, Tensors
from vdcore_bench.measure import machine, products
from vdcore_bench.measure.journal import JOINED, Journal, Row, Watch, row_here, text_of
from vdcore_bench.measure.judge import Judge, flat, gradients, incoming
from vdcore_bench.measure.timing import ROUNDS, Clock, Contender, Spread, clock_for, race_within
from vdcore_bench.peers import PEERS, Peer
from vdcore_bench.peers.adapter import Function, masked

REFERENCE_FLOPS = 2e8  # largest problem on which the reference backend is timed if another backend exists
LATE = "not begun: the time of the run was over"
UNQUEUED = "it ran while Python was still launching it: the time holds both"
NEAR = 2.0  # peers slower than this many times the fastest one are not raced again


@dataclass(frozen=True)
class Settings:
    """How jobs are run.

    Args:
        seconds: for the rounds of one job, without compiling and judging.
        memory: bytes a provider may need.
        peers: names to measure, ``"sdpa"`` for all ``"sdpa[...]"``; None: all.
        own: baselines beside those of :data:`~vdcore_bench.peers.PEERS`.
        until: of time.monotonic(); jobs and peers that have not begun by then are rows that say so.
        each: seconds for the first calls of one job; peers that have not begun by then are rows that say so.
        compiled: also what torch.compile makes.
        slow_start: also those that compile for many seconds, where they have no mask to show their strength.
    """

    seconds: float = 2.0
    rounds: int = ROUNDS
    memory: int = 2**62
    peers: frozenset[str] | None = None
    own: tuple[Peer, ...] = ()
    compiled: bool = True
    slow_start: bool = True
    until: float = math.inf
    each: float = math.inf

    def wants(self, provider: str) -> bool:
        return self.peers is None or bool(self.peers & {provider, provider.partition("[")[0]})


@dataclass
class Candidate:
    """One variant of one provider: a function of the public arguments, or the reason why there is none."""

    provider: str
    variant: str = ""
    function: Function | None = None
    status: str = "ok"
    reason: str = ""
    need: int | None = None  # bytes, with status "predicted"
    contender: Contender | None = None
    error_ratio: float | None = None

    @property
    def name(self) -> str:
        return f"{self.provider} {self.variant}".strip()


def blank(job: Job) -> Row:
    """A row with everything that the job and the machine say."""
    return row_here(
        job.device,
        job.dtype,
        op=job.op,
        workload=job.workload.name,
        provider="",
        mode=job.mode,
        case=job.case,
        x=job.shape.T,
        flops=job.flops() or None,
        bytes=job.traffic(),
        products=products.floor(job.flops(), job.dtype) if job.device == "cpu" and job.flops() else None,
        original=job.original.sizes(),
        shape=job.shape.sizes(),
        scaling=job.shape.describe(job.original),
    )


def row_of(base: Row, c: Candidate) -> Row:
    row = replace(base, provider=c.provider, variant=c.variant, status=c.status, reason=c.reason)
    if c.need is not None:
        return replace(row, metric="memory", unit="bytes", p50=float(c.need))
    if c.contender is None or not c.contender.samples:
        return row
    samples = c.contender.samples
    return row.measured(
        c.contender.spread,
        error_ratio=c.error_ratio,
        host=_median([s.host for s in samples]),
        page_faults=_median([s.faults for s in samples]),
        reason=row.reason if all(s.queued for s in samples) else text_of(row.reason, UNQUEUED),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [float(x) for x in values if x is not None]
    return Spread.of(known).p50 if known else None


def heap_for(jobs: Iterable[Job], limit: int) -> int:
    """Bytes that cover the results of the largest job and what its providers need beside them."""
    return max((3 * job.memory() for job in jobs if job.memory() <= limit), default=0)


# ---- The providers of a job ----


def candidates(job: Job, tensors: Tensors, settings: Settings, before: Sequence[Row] = ()) -> list[Candidate]:
    """vdcore on every backend, the copy where memory is the limit, and every peer; each usable or with its reason.

    Args:
        before: rows of the job's earlier race: those without a row come first, then what is raced again beside them.
    """
    found = _ours(job, tensors) if settings.wants("vdcore") else []
    if job.MEMORY_BOUND and settings.wants("copy"):
        found += _copies(job)
    for peer in (*PEERS, *settings.own):
        if job.op not in peer.ops or not settings.wants(peer.name):
            continue
        reason = peer.why_not(job)
        if reason is None and peer.slow_start and not settings.slow_start and not masked(job):
            reason = f"it compiles for many seconds: left out of the default set, run it with --peer {peer.name}"
        need = job.memory() + peer.workspace(job)
        if reason is not None:
            found.append(Candidate(peer.name, status="skipped", reason=reason))
        elif need > settings.memory:
            found.append(too_large(peer.name, need, settings.memory))
        else:
            found += _variants(peer, job, settings.compiled)
    known, again = names(before), _near(before)
    new = [c for c in found if c.name not in known]
    return new + [c for c in found if c.name in again] if new else []


def names(rows: Iterable[Row]) -> set[str]:
    """As :attr:`Candidate.name`."""
    return {f"{row.provider} {row.variant}".strip() for row in rows}


def _near(before: Sequence[Row]) -> set[str]:
    """Names of what is raced again: ours, the copy, and what is near the fastest peer."""
    timed = [row for row in before if row.status == "ok" and row.metric == "time" and row.p50]
    peers = [row.p50 or 0.0 for row in timed if not row.provider.startswith(("vdcore", "copy"))]
    limit = NEAR * min(peers, default=math.inf)
    return names(r for r in timed if r.variant == "auto" or r.provider == "copy" or (r.p50 or 0.0) <= limit)


def too_large(provider: str, need: int, limit: int) -> Candidate:
    reason = f"needs {machine.bytes_text(need)}, the limit is {machine.bytes_text(limit)}"
    return Candidate(provider, status="predicted", reason=reason, need=need)


def _variants(peer: Peer, job: Job, compiled: bool) -> list[Candidate]:
    found = []
    try:
        for variant, make in peer.variants(job).items():
            if compiled or "compiled" not in variant:
                found.append(Candidate(peer.name, variant, make()))
    except Exception as error:
        found.append(Candidate(peer.name, status="failed", reason=first_line(error)))
    return found


def _ours(job: Job, tensors: Tensors) -> list[Candidate]:
    with torch.set_grad_enabled(job.has_backward):
        reasons = vdcore.explain(job.op, **job.arguments(tensors))
    found = []
    for i, (backend, reason) in enumerate(reasons):
        name = f"vdcore[{backend}]"
        if reason is None and backend == "reference" and i and job.flops() > REFERENCE_FLOPS:
            reason = "the reference, too slow to be timed at this size"
        on_cpu = not job.device.startswith("cuda")
        if reason is None and backend == "triton" and on_cpu and stub.INSTALLED is None:
            reason = "Triton's interpreter is for tests"
        if reason is None and backend == "cuda" and on_cpu:
            reason = "the emulator of CUDA kernels is for tests"
        if reason is not None:
            found.append(Candidate(name, status="skipped", reason=reason))
        else:
            function = partial(getattr(vdcore, job.op), backend=backend)
            found.append(Candidate(name, "auto" if i == 0 else "named", function))
    return found + (_parts(job, tensors) if job.op == "gated_attention" else [])


def _parts(job: Job, tensors: Tensors) -> list[Candidate]:
    """What gated attention is made of, one operator after the other: what fusing them saves."""

    def both(spatial: Any, temporal: Any, norm: Any, rope: Any, **rest: Any) -> tuple[Any, Any]:
        a = vdcore.spatial_attention(*spatial, norm=norm[0], rope=rope[0])
        return a, vdcore.temporal_attention(*temporal, norm=norm[1], rope=rope[1])

    def mixed(gate: Tensor, **rest: Any) -> Tensor:
        a, b = both(**rest)
        return gate * a + (1 - gate) * b

    def interpolated(gate: Tensor, **rest: Any) -> Tensor:
        a, b = both(**rest)
        return torch.lerp(b, a, gate)

    def unmixed(_: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return both(**job.arguments(tensors))

    name = "vdcore, in parts"
    found = [Candidate(name, "mixed by the formula", mixed), Candidate(name, "mixed by lerp", interpolated)]
    if job.mode == "fwd":
        found.append(Candidate(name, "not mixed", contender=Contender(unmixed)))
    return found


def _copies(job: Job) -> list[Candidate]:
    """Half the job's traffic read and half written: what memory allows."""
    half = max(job.traffic() // (2 * job.dtype.itemsize), 1)
    source = torch.zeros(half, dtype=job.dtype, device=job.device)
    if source.is_cuda:  # whose memory moves zeros faster than numbers
        source.normal_()
    target = torch.zeros_like(source)
    return [
        Candidate("copy", "existing memory", contender=Contender(lambda _: target.copy_(source))),
        Candidate("copy", "fresh memory", contender=Contender(lambda _: source.clone())),
    ]


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


# ---- One job ----


class Calls:
    """A provider's function as forward, backward or both, on the job's tensors."""

    def __init__(self, job: Job, tensors: Tensors) -> None:
        self.job, self.tensors = job, tensors
        self.leaves = [tensors[name] for name in job.learned] if job.has_backward else []
        self.dout: list[Tensor] = []

    def forward(self, function: Function) -> list[Tensor]:
        with torch.set_grad_enabled(self.job.has_backward):
            return flat(function(**self.job.arguments(self.tensors)))

    def backward(self, outputs: list[Tensor]) -> list[Tensor]:
        return gradients(outputs, self.leaves, self.dout)

    def contender(self, function: Function) -> Contender:
        if self.job.mode == "fwd":
            return Contender(lambda _: self.forward(function))
        if self.job.mode == "bwd":
            return Contender(self.backward, prepare=lambda: self.forward(function))
        return Contender(lambda _: self.backward(self.forward(function)))

    def once(self, function: Function) -> tuple[list[Tensor], Tensors]:
        """Outputs, and gradients by name."""
        outputs = self.forward(function)
        if not self.dout:
            self.dout = incoming(outputs)
        if not self.job.has_backward:
            return outputs, {}
        return outputs, dict(zip(self.job.learned, self.backward(outputs)))


def run_job(job: Job, settings: Settings, journal: Journal, watch: Watch, clock: Clock | None = None) -> list[Row]:
    """Measures one job; its rows stand in the journal even if it is interrupted."""
    base, begin = blank(job), len(journal.rows)
    before = journal.of(base)
    if job.memory() > settings.memory:
        journal.add([] if before else [row_of(base, too_large("all", job.memory(), settings.memory))])
        return journal.rows[begin:]
    tensors = job.leaves()
    clock = clock or clock_for(job.device)
    field_of = candidates(job, tensors, settings, before)
    journal.add(row_of(base, c) for c in field_of if c.status != "ok")
    calls, judge = Calls(job, tensors), Judge(job, tensors)
    deadline = min(settings.until, time.monotonic() + settings.each)
    ready, certain = {}, names(before)
    for c in (c for c in field_of if c.status == "ok"):
        if time.monotonic() > deadline and c.variant != "auto" and c.name not in certain:
            c.status, c.reason = "skipped", late(job)
        else:
            watch.doing(c.name)
            _warm_up(c, calls, judge, clock, settings.seconds)
        if c.status == "ok":
            ready[c.name] = c
        else:
            journal.add([row_of(base, c)])
    if before and certain.issuperset(ready):
        return journal.rows[begin:]
    contenders = {name: c.contender for name, c in ready.items() if c.contender is not None}
    watch.doing("rounds")
    whole = False
    try:
        race_within(
            contenders,
            settings.seconds,
            settings.rounds,
            clock,
            ours=frozenset(name for name, c in ready.items() if c.variant == "auto"),
            apart=frozenset(name for name, c in ready.items() if c.provider == "copy"),
            until=max(deadline, time.monotonic()) + 2 * settings.seconds,
        )
        whole = True
    finally:
        if whole or not before:  # what was interrupted replaces nothing
            rows = [row_of(base, c) for c in ready.values() if c.contender and c.contender.samples]
            note = JOINED if before else ""
            journal.add(replace(row, reason=text_of(note, row.reason)) for row in rows)
    return journal.rows[begin:]


def late(job: Job) -> str:
    return f"{LATE}: measure it with --op {job.op}"


def _warm_up(c: Candidate, calls: Calls, judge: Judge, clock: Clock, seconds: float) -> None:
    """First call (which compiles), judgement of its result, one or two more as the estimate."""
    try:
        begin = time.perf_counter()
        if c.function is not None:
            c.contender = calls.contender(c.function)
            outputs, found = calls.once(c.function)
            first = time.perf_counter() - begin
            c.error_ratio = judge.ratio(outputs, calls.dout, found)
            c.reason = judge.note
            del outputs, found
            # On a GPU a first call is plans, modules and compilers: no estimate of the next.
            cold = calls.job.device.startswith("cuda")
            if first > seconds / 2 and not cold and "compiled" not in c.variant and calls.job.mode != "bwd":
                c.contender.estimate, c.reason = first, "one cold call"
                return
        assert c.contender is not None
        c.contender.estimate = c.contender.run(clock).seconds
        if c.contender.estimate < seconds / 10 or calls.job.device.startswith("cuda"):
            c.contender.estimate = c.contender.run(clock).seconds
    except Exception as error:
        c.status, c.reason, c.contender = "failed", first_line(error), None


def run_jobs(
    jobs: Iterable[Job], settings: Settings, journal: Journal, watch: Watch | None = None, clock: Clock | None = None
) -> None:
    """Measures jobs one after another. ``KeyboardInterrupt`` passes through, after its job's rows were written."""
    watch, jobs = watch or Watch(), list(jobs)
    for number, job in enumerate(jobs):
        watch.step(job.title, number, len(jobs))
        base = blank(job)
        before = journal.of(base)
        try:
            if job.device.startswith("cuda") and not torch.cuda.is_available():
                if not before:
                    journal.add([replace(base, provider="all", status="skipped", reason="no GPU is visible to torch")])
            elif time.monotonic() > settings.until:
                who = "compiled" if before else "all"
                journal.add([replace(base, provider=who, status="skipped", reason=late(job))])
            else:
                run_job(job, settings, journal, watch, clock)
                if settings.compiled:
                    torch.compiler.reset()  # a compiled function of the next job is another one
        finally:
            watch.done(journal.of(base))
