"""Every operator against its baselines: the default set, or what the command line names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vdcore_bench.jobs import JOBS, make
from vdcore_bench.jobs.base import DTYPES, Job
from vdcore_bench.measure import machine
from vdcore_bench.measure.journal import Journal, Row, Watch
from vdcore_bench.suites import Options
from vdcore_bench.suites.models import block
from vdcore_bench.suites.runner import Settings, blank, heap_for, run_jobs
from vdcore_bench.workloads import Budget, load

BOTH = ("float32", "bfloat16")
TAKES = frozenset({"ops", "workloads", "peers", "own", "modes", "dtypes", "norm_rope", "batch"})
TAKES |= {"seconds", "rounds", "memory_limit", "full_size", "until"}


@dataclass(frozen=True)
class Item:
    """An operator on a workload, in some modes and dtypes; ``share``: of the budget of one call."""

    op: str
    workload: str
    modes: tuple[str, ...] = ("fwd",)
    dtypes: tuple[str, ...] = BOTH
    norm_rope: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class Step:
    """Jobs of a run that are shown together; ``each`` and ``compiled`` as the runner's settings have them."""

    title: str
    items: tuple[Item, ...]
    compiled: bool = True
    each: float = 40.0


TRAINING = ("fwd", "fwd+bwd")
EVERY_OPERATOR = (
    Item("temporal_attention", "latte-1-512"),
    Item("spatial_attention", "latte-1-512", share=0.6),
    Item("video_attention", "wan2.2-5b-704p", share=0.5),
    Item("gated_attention", "latte-1-512", share=0.3),
    Item("cross_attention", "latte-1-512", share=0.3),
    Item("qk_norm_rope", "stdit3-720p-102f", share=0.5),
    Item("patchify", "latte-1-512", share=0.3),
    Item("unpatchify", "latte-1-512", share=0.3),
    Item("modulate", "stdit3-720p-102f", share=0.5),
    Item("gate_residual", "stdit3-720p-102f", share=0.5),
)
TEMPORAL = ("latte-1-512", "stdit3-720p-102f", "svd-xt-level1", "animatediff-level1")


def _in(dtype: str) -> tuple[Item, ...]:
    return tuple(replace(item, dtypes=(dtype,)) for item in EVERY_OPERATOR)


# The default set, breadth first: nothing is compiled before every operator has its row, and what the clock cuts off is
# at the end. A first step of 10 x (15 + 2) seconds at most ends within three minutes.
FIRST = (
    Step("Every operator", _in("float32"), compiled=False, each=15.0),
    Step("Every operator, raced with compiled peers", _in("float32")),
)
THEN = (
    Step("Every operator in half precision", _in("bfloat16")),
    Step(
        "Training",
        (
            Item("temporal_attention", "latte-1-512", ("fwd+bwd",), share=0.4),
            Item("spatial_attention", "latte-1-512", ("fwd+bwd",), share=0.3),
            Item("video_attention", "wan2.2-5b-704p", ("fwd+bwd",), ("float32",), share=0.5),
        ),
    ),
    Step(
        "Masks of models",
        (
            Item("video_attention", "long-video-60f", TRAINING, ("float32",), share=0.5),
            Item("video_attention", "long-video-60f", dtypes=("bfloat16",), share=0.3),
            Item("video_attention", "self-forcing-1.3b", dtypes=("float32",), share=0.5),
        ),
    ),
    Step(
        "Temporal attention over workloads",
        (
            *(Item("temporal_attention", name) for name in TEMPORAL[1:]),
            *(Item("temporal_attention", name, norm_rope=True) for name in TEMPORAL),
            *(Item("temporal_attention", name, ("fwd+bwd",), share=0.4) for name in TEMPORAL[1:]),
        ),
    ),
)


def items(options: Options) -> list[Item]:
    """The default set, filtered; with workloads named, every operator of theirs, or those named."""
    ops = [op for op in options.ops if op != block.OP]
    if options.workloads:
        found = [
            Item(op, name, norm_rope=options.norm_rope) for name in options.workloads for op in ops or load()[name].ops
        ]
    else:
        default = (*EVERY_OPERATOR, *(item for step in THEN for item in step.items))
        found = [item for item in default if not ops or item.op in ops]
        if options.norm_rope:
            found = [replace(item, norm_rope=True) for item in found if not item.norm_rope]
    return [replace(i, modes=options.modes or i.modes, dtypes=options.dtypes or i.dtypes) for i in found]


def jobs(found: Sequence[Item], device: str, budget: Budget, batch: int = 1) -> tuple[list[Job], list[Row]]:
    """The jobs, and a row with its reason for every item that is none."""
    made: list[Job] = []
    impossible: list[Row] = []
    for item in found:
        limit = Budget(budget.flops * item.share, budget.bytes * item.share)
        workload = load()[item.workload]
        reason = JOBS[item.op].why_not(workload)
        if reason is not None:
            like = blank(make("modulate", workload, device=device))
            impossible.append(
                replace(like, op=item.op, provider="all", status="skipped", reason=reason, flops=None, bytes=None)
            )
            continue
        for dtype in item.dtypes:
            for mode in item.modes:
                job = make(
                    item.op,
                    workload,
                    mode=mode,
                    dtype=DTYPES[dtype],
                    device=device,
                    norm_rope=item.norm_rope,
                    batch=batch,
                    budget=limit,
                )
                if job not in made:
                    made.append(job)
    return made, impossible


def run(options: Options, journal: Journal, watch: Watch) -> None:
    """What the options name; the default set step by step, if they name nothing."""
    if options.ops != (block.OP,):
        chosen = Step("Operators", tuple(items(options)), each=math.inf)
        for step in (chosen,) if options.choose else (*FIRST, *THEN):
            run_step(step, options, journal, watch)
    if block.OP in options.ops:
        block.run(options, journal, watch)


def run_step(step: Step, options: Options, journal: Journal, watch: Watch) -> None:
    """The jobs of one step, in a part of their own."""
    wanted, impossible = jobs(step.items, options.device, options.budget, options.batch)
    journal.add(impossible)
    only = options.peers | {"vdcore", "copy"} | {peer.name for peer in options.own} if options.peers else None
    settings = Settings(
        seconds=options.seconds,
        rounds=options.rounds,
        memory=options.limit,
        peers=only,
        own=options.own,
        compiled=step.compiled,
        slow_start=options.choose,
        until=options.until if step.compiled else math.inf,  # the clock cuts off no operator
        each=step.each,
    )
    with watch.part(step.title):
        if options.device == "cpu":
            watch.doing("touching memory")
            machine.touch_heap(min(heap_for(wanted, settings.memory), settings.memory // 2))
        run_jobs(wanted, settings, journal, watch)
