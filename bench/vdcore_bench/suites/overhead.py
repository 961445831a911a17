"""What a call costs beside its kernel: the time of a call on so few tokens that there is nothing to compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import vdcore
from vdcore.ops.choose import implementation
from vdcore.ops.operator import capture
from vdcore_bench.jobs import make
from vdcore_bench.jobs.base import Job
from vdcore_bench.measure.journal import Journal, Row, Watch
from vdcore_bench.measure.judge import flat
from vdcore_bench.measure.timing import Contender, CpuClock, Spread, race
from vdcore_bench.peers import PEERS
from vdcore_bench.suites import Options, no_gpu
from vdcore_bench.suites.runner import LATE, blank
from vdcore_bench.workloads import Shape, load

TAKES = frozenset({"ops", "modes", "until"})
why_not = no_gpu
TINY = Shape(B=1, T=4, rows=1, columns=4, H=2, G=2, D=16, L=0)
OPS = ("temporal_attention", "spatial_attention", "qk_norm_rope", "modulate", "gate_residual")
ROUNDS = 31
ROUND_SECONDS = 4e-3  # of one provider's calls in one round


@dataclass(frozen=True)
class Way:
    """One way to make the call; ``variant`` is ``"kernel alone"`` for what the others' overhead is beside."""

    provider: str
    variant: str
    call: Callable[[], Any]


def tiny_job(op: str, mode: str = "fwd", device: str = "cpu") -> Job:
    """The operator on :data:`TINY`, float32."""
    return make(op, replace(load()["latte-1-512"], name="tiny"), mode=mode, shape=TINY, device=device)


def ways(job: Job) -> Iterator[Way]:
    """vdcore's public function, its kernel without checks and registration, and PyTorch's shortest way."""
    tensors = job.leaves()
    leaves = [tensors[name] for name in job.learned]
    arguments = job.arguments(tensors)
    public = getattr(vdcore, job.op)

    def with_backward(forward: Callable[[], Any]) -> Callable[[], Any]:
        if not job.has_backward:
            return forward
        dout = [torch.ones_like(y) for y in flat(forward())]
        return lambda: torch.autograd.grad(flat(forward()), leaves, dout, allow_unused=True)

    with torch.set_grad_enabled(job.has_backward):
        backend = vdcore.explain(job.op, **arguments)[0][0]
        yield Way(f"vdcore[{backend}]", "auto", with_backward(lambda: public(**arguments)))
        if not job.has_backward:
            call = capture(getattr(vdcore, job.op), **arguments)
            kernel = implementation(call, backend).forward
            yield Way(f"vdcore[{backend}]", "kernel alone", lambda: kernel(call))
    for peer in PEERS:
        if job.op in peer.ops and peer.module == "torch" and not peer.slow_start and peer.why_not(job) is None:
            for variant, maker in peer.variants(job).items():
                if variant in ("strided", "eager", "formula", "layer_norm", "addcmul"):
                    yield Way(peer.name, variant, with_backward(partial(maker(), **arguments)))
    if job.op.endswith("attention"):
        q, k, v = torch.randn(3, 4, 2, 4, 16, device=job.device, requires_grad=job.has_backward).unbind()

        def bare() -> Any:
            return F.scaled_dot_product_attention(q, k, v)

        if job.has_backward:
            dy = torch.ones_like(q)
            yield Way("sdpa", "bare call", lambda: torch.autograd.grad(bare(), (q, k, v), dy))
        else:
            yield Way("sdpa", "bare call", bare)


def measure(job: Job, rounds: int = ROUNDS) -> Iterator[Row]:
    """One row per way: seconds of a call, from interleaved rounds of many calls. On a GPU the calls are only queued."""
    base, clock = replace(blank(job), metric="overhead", scaling="", original={}), CpuClock()
    racing: dict[Way, tuple[Contender, int]] = {}
    with torch.set_grad_enabled(job.has_backward):
        for way in ways(job):
            for _ in range(20):
                way.call()
            once = min(clock.measure(way.call).seconds for _ in range(20))
            count = max(1, round(ROUND_SECONDS / once))
            racing[way] = (Contender(lambda _, f=way.call, n=count: _repeat(f, n)), count)  # type: ignore[misc]
        contenders = {f"{way.provider} {way.variant}": contender for way, (contender, _) in racing.items()}
        race(contenders, dict.fromkeys(contenders, rounds), clock)
    for way, (contender, count) in racing.items():
        spread = Spread.of([sample.seconds / count for sample in contender.samples])
        yield base.measured(spread, provider=way.provider, variant=way.variant)


def _repeat(call: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        call()


def run(options: Options, journal: Journal, watch: Watch) -> None:
    """Every operator of :data:`OPS`, or those named, forward, and the first also with backward; on one thread.

    With more, some providers start and join all of them for a few tokens, and that would be what is measured.
    """
    ops, threads = options.ops or OPS, torch.get_num_threads()
    wanted = [(op, mode) for op in ops for mode in options.modes or ("fwd",)]
    if not options.modes:
        wanted.append((ops[0], "fwd+bwd"))
    torch.set_num_threads(1)
    try:
        with watch.part("Time of a call on 16 tokens, one thread"):
            for number, (op, mode) in enumerate(wanted):
                job, begin = tiny_job(op, mode, options.device), len(journal.rows)
                watch.step(f"call overhead of {op}, {mode}", number, len(wanted))
                if time.monotonic() > options.until:
                    row = replace(blank(job), metric="overhead", provider="all", status="skipped", reason=LATE)
                    journal.add([row])
                else:
                    journal.add(measure(job))
                watch.done(journal.rows[begin:])
    finally:
        torch.set_num_threads(threads)
