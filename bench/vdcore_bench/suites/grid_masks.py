"""Windows in frames, rows and columns on one grid: time per visible pair, and what density buys, beside others.

All masks of a provider run in one race. What compiles or builds a mask does so before the clock. Who cannot run a mask
here is a row with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore import FrameMask
from vdcore.integrations.mask_names import parse_mask
from vdcore.testing import TORCH_FORMS, error_ratio
from vdcore_bench.jobs import make
from vdcore_bench.jobs.base import DTYPE_NAMES, Job, mask_text
from vdcore_bench.measure import machine
from vdcore_bench.measure.journal import GRID_MASKS, Journal, Row, Watch
from vdcore_bench.measure.machine import seconds_text
from vdcore_bench.measure.timing import Contender, clock_for, race
from vdcore_bench.peers import PEERS
from vdcore_bench.peers.adapter import Function
from vdcore_bench.report.plot import BEST, COPY, NAIVE, OURS, THIRD, new_plot, png
from vdcore_bench.suites.runner import LATE, blank
from vdcore_bench.workloads import Shape, load

# The Wan grid of a short clip; the workload gives the width of a head.
GRID = {"cpu": (8, 22, 40), "cuda": (21, 45, 80)}  # frames, rows and columns
WORKLOADS = ("ltx-2b-704p", "wan2.2-5b-704p")  # 64 and 128 channels
MASKS = {
    "cpu": (
        "dense",
        "tiles:5/5/3:1/4/8",
        "tiles:3/3/3:1/4/8",
        "neighborhood:5/15/27",
        "neighborhood:3/11/19",
        "window:1/1/4/8",
        "radial",
    ),
    "cuda": (
        "dense",
        "tiles:7/7/7:2/4/8",
        "tiles:3/3/3:6/8/8",
        "neighborhood:13/31/55",
        "neighborhood:7/23/39",
        "radial",
    ),
}
THEIRS = ("sdpa[flash]", "sdpa[efficient]", "flex", "natten", "sta", "vsa")
ROUNDS, FEW_ROUNDS = 5, 3


@dataclass
class _Entry:
    """One mask by one provider, ready to run."""

    name: str
    job: Job
    provider: str
    variant: str
    contender: Contender
    error_ratio: float


def sweep(
    journal: Journal,
    watch: Watch,
    device: str,
    dtypes: Sequence[torch.dtype],
    *,
    grid: tuple[int, int, int] | None = None,
    masks: Sequence[str] | None = None,
    workloads: Sequence[str] = WORKLOADS,
    rounds: int = ROUNDS,
    until: float = float("inf"),
) -> None:
    """Measures every mask by every provider, for each width of heads."""
    kind = torch.device(device).type
    size, names = grid or GRID[kind], masks or MASKS[kind]
    for workload in workloads:
        for dtype in dtypes:
            with watch.part("What a window in rows and columns costs"):
                begin = len(journal.rows)
                try:
                    _sweep_one(journal, watch, device, dtype, size, names, workload, rounds, until)
                finally:
                    watch.done(journal.rows[begin:])


def _sweep_one(
    journal: Journal,
    watch: Watch,
    device: str,
    dtype: torch.dtype,
    grid: tuple[int, int, int],
    names: Sequence[str],
    workload: str,
    rounds: int,
    until: float,
) -> None:
    T, rows, columns = grid
    heads = 2 if torch.device(device).type == "cpu" else load()[workload].shape().H
    shape = Shape(B=1, T=T, rows=rows, columns=columns, H=heads, G=heads, D=load()[workload].shape().D)
    entries = list[_Entry]()
    for name in names:
        mask = parse_mask(name, grid)
        masks: dict[str, Any] = (
            {"mask": mask} if isinstance(mask, FrameMask) else {"grid_mask": mask, "mask": FrameMask()}
        )
        job = make("video_attention", load()[workload], dtype=dtype, device=device, shape=shape, **masks)
        if time.monotonic() > until:
            journal.add(
                [_row(job, name, "all", status="skipped", reason=f"{LATE}: measure it with `vdcore bench masks`")]
            )
            continue
        watch.doing(f"windows, {DTYPE_NAMES[dtype]}: warming up {name}")
        entries += _entries(journal, job, name)
    watch.doing(f"windows, {DTYPE_NAMES[dtype]}: {rounds} rounds of {len(entries)} calls")
    contenders = {f"{e.provider} {e.name}": e.contender for e in entries}
    try:
        race(contenders, dict.fromkeys(contenders, rounds), clock_for(device), until)
    finally:
        for e in entries:
            if e.contender.samples:
                row = _row(e.job, e.name, e.provider, e.variant)
                journal.add([row.measured(e.contender.spread, error_ratio=e.error_ratio)])


def _entries(journal: Journal, job: Job, name: str) -> list[_Entry]:
    """Every provider that can run the job, after a first call, judged; the others are rows at once."""
    arguments = job.arguments(job.tensors())
    made: dict[tuple[str, str], Callable[[], Function]] = {("vdcore", ""): lambda: vdcore.video_attention}
    for peer in PEERS:
        if peer.name not in THEIRS:
            continue
        reason = peer.why_not(job)
        if reason is None and peer.workspace(job) > machine.memory_limit(job.device) // 2:
            reason = "its scores would not fit"
        if reason is not None:
            journal.add([_row(job, name, peer.name, status="skipped", reason=reason)])
            continue
        makers = peer.variants(job)
        variant = "dense mask" if "dense mask" in makers else next(iter(makers))
        made[peer.name, variant] = makers[variant]
    found = []
    for (provider, variant), maker in made.items():
        try:
            function = maker()
            with torch.no_grad():
                result = function(**arguments)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            journal.add([_row(job, name, provider, variant, status="failed", reason=what[:300])])
            continue
        found.append(_Entry(name, job, provider, variant, Contender(_call(function, arguments)), _judge(job, result)))
    return found


def _call(function: Function, arguments: dict[str, Any]) -> Callable[[Any], Tensor]:
    def call(_: Any) -> Tensor:
        with torch.no_grad():
            return function(**arguments)

    return call


def _judge(job: Job, result: Tensor) -> float:
    """The error ratio of the last frame of one head, which is a problem of its own."""
    T = job.shape.T
    q, k, v = (x[..., :1, :] for x in job.qkv(job.tensors()))
    given = {name: x for name, x in job.arguments(job.tensors()).items() if name in ("mask", "grid")}
    piece: dict[str, Any] = {"q": q[:, -1:], "k": k, "v": v, "q_start": T - 1, **given}
    wide: dict[str, Any] = {name: x.double() if isinstance(x, Tensor) else x for name, x in piece.items()}
    exact = vdcore.video_attention(**wide, backend="reference")
    forms = [form(**piece) for form in TORCH_FORMS[job.op].values()]
    return error_ratio(result[:, -1:, :, :1], exact, forms).worst


def _row(job: Job, name: str, provider: str, variant: str = "", **rest: Any) -> Row:
    about = mask_text(job.grid_mask or job.mask)
    return replace(blank(job), case=GRID_MASKS + name, provider=provider, variant=variant, **{"reason": about, **rest})


# ---- Tables and pictures ----

HEADER: tuple[str, ...] = (
    "mask",
    "visible",
    "by",
    "time",
    "time per visible pair",
    "over own dense",
    "speed-up",
    "error",
)
LEGEND = (
    "Forward. Time per visible pair: of the pairs that the mask leaves visible, whoever computes more. Over own dense: "
    "that, over the same of vdcore's dense attention in the same race. Speed-up: of vdcore over this provider."
)


@dataclass(frozen=True)
class Race:
    """The rows of one race: a grid, a width of heads, a dtype."""

    title: str
    rows: list[Row]

    def time(self, mask: str, provider: str) -> float | None:
        """Seconds; SDPA is the best of its backends."""
        times = [r.p50 for r in self.rows if r.case == mask and r.provider.startswith(provider) and r.p50]
        return min(times, default=None)

    @property
    def masks(self) -> list[str]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def pairs(self, mask: str) -> float:
        row = next(row for row in self.rows if row.case == mask and row.flops)
        return (row.flops or 0.0) / (4 * row.shape["D"])

    def density(self, mask: str) -> float:
        s = self.rows[0].shape
        return self.pairs(mask) / (s["B"] * s["H"] * (s["T"] * s["S"]) ** 2)


def races(rows: Sequence[Row]) -> list[Race]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.case.startswith(GRID_MASKS) and row.status == "ok" and row.p50:
            s = row.shape
            title = f"{s['T']} frames of {s['S']} tokens, {s['H']} x {s['D']} channels, {row.dtype}, {row.device}"
            found.setdefault(title, []).append(row)
    return [Race(title, of) for title, of in found.items()]


def cells(race: Race) -> list[tuple[str, ...]]:
    """Table rows as :data:`HEADER` names them."""
    dense, lines = race.time(f"{GRID_MASKS}dense", "vdcore"), list[tuple[str, ...]]()
    whole = None if dense is None else dense / race.pairs(f"{GRID_MASKS}dense")
    for row in race.rows:
        assert row.p50
        per_pair, ours = row.p50 / race.pairs(row.case), race.time(row.case, "vdcore")
        name = row.case.removeprefix(GRID_MASKS)
        lines.append(
            (
                f"{name} ({row.reason})" if row.reason else name,
                f"{race.density(row.case):.1%}",
                row.provider,
                seconds_text(row.p50),
                f"{per_pair * 1e9:.3g} ns",
                "-" if whole is None else f"{per_pair / whole:.2f}",
                "-" if ours is None or row.provider == "vdcore" else f"{row.p50 / ours:.1f}x",
                "-" if row.error_ratio is None else f"{row.error_ratio:.2f}",
            )
        )
    return lines


STYLES = (("vdcore", OURS, "o"), ("flex", THIRD, "s"), ("sdpa", BEST, "^"), ("natten", NAIVE, "D"))


def picture(found: Sequence[Race]) -> bytes:
    """Speed-up over own dense attention against density, by provider; the line is time in proportion to pairs."""
    figure, axes = new_plot(5.2 * len(found), 4.4, columns=len(found))
    for axis, one in zip(axes[0], found):
        dense = one.time(f"{GRID_MASKS}dense", "vdcore")
        for provider, color, marker in (
            ("vdcore", OURS, "o"),
            ("flex", THIRD, "s"),
            ("sdpa", BEST, "^"),
            ("natten", NAIVE, "D"),
        ):
            points = [(one.density(m), dense / t) for m in one.masks if dense and (t := one.time(m, provider))]
            if points:
                axis.plot(*zip(*sorted(points)), color=color, marker=marker, label=provider, markersize=5)
        shares = sorted({one.density(mask) for mask in one.masks})
        axis.plot(shares, [1 / x for x in shares], color=COPY, linestyle=":", linewidth=1, label="pairs alone")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("visible pairs over all")
        axis.set_ylabel("vdcore's dense time over this time")
        axis.set_title(one.title, fontsize=8)
        axis.grid(alpha=0.25, which="both")
        axis.legend(fontsize=7.5)
    return png(figure)
