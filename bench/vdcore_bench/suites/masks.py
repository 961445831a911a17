"""What a mask costs: time per visible pair of frame masks over numbers of frames, against dense attention's.

A kernel that loops over runs of visible frames takes the same time for a pair, whatever the mask and however long
the video. All masks and lengths run in one race, so that a drift of the machine hits all alike; SDPA, which gets the
same mask as a boolean matrix, takes part where its score matrix is small enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore import FrameMask, GridMask
from vdcore.testing import TORCH_FORMS, error_ratio
from vdcore_bench.jobs import make
from vdcore_bench.jobs.base import DTYPE_NAMES, DTYPES, Job, Tensors, mask_text
from vdcore_bench.measure.journal import MASKS, Journal, Row, Watch
from vdcore_bench.measure.machine import seconds_text
from vdcore_bench.measure.timing import Contender, clock_for, race
from vdcore_bench.peers import PEERS
from vdcore_bench.peers.adapter import Function, masked
from vdcore_bench.report.plot import BEST, COPY, NAIVE, OURS, new_plot, png
from vdcore_bench.suites import Options, grid_masks, no_gpu
from vdcore_bench.suites.memory import function_of
from vdcore_bench.suites.operators import BOTH
from vdcore_bench.suites.runner import LATE, blank
from vdcore_bench.workloads import Shape, load

TAKES = frozenset({"dtypes", "until"})
why_not = no_gpu
FEW_ROUNDS = 3
FORCED = "teacher forcing"
SWEEP: dict[str, FrameMask | Callable[[int], FrameMask]] = {  # some by the number of frames
    "dense": FrameMask.full(),
    "causal": FrameMask.causal(),
    "chunk-causal": FrameMask(future=0, chunk=4),
    "window": FrameMask.window(2),  # at 32 frames a tenth of the pairs
    "symmetric window": FrameMask.symmetric(2),
    "window + sink": FrameMask(past=2, future=0, sink=1),
    FORCED: lambda T: FrameMask.teacher_forcing(T // 2, 4),
}
RADIAL = "radial"  # of the grid at hand, whose visible pairs grow as N log N in frames
SDPA_FLOPS = {"cpu": 3e10, "cuda": 2e14}  # of all pairs, hidden ones too: SDPA computes them


@dataclass(frozen=True)
class Sweep:
    """Masks over numbers of frames, all in one race.

    Args:
        tokens: rows and columns of a frame, by the kind of device.
        heads: on a CPU; on a GPU the workload's.
        flops: of one call, on a CPU per thread; a mask that has more visible pairs is left out at that length.
    """

    workload: str
    frames: tuple[int, ...]
    tokens: dict[str, tuple[int, int]]
    heads: int
    names: tuple[str, ...]
    flops: dict[str, float]
    rounds: int


EVERY = Sweep(  # alone 50 s per dtype on 2 cores, in the default set 25
    workload="latte-1-512",
    frames=(16, 32, 64, 128),
    tokens={"cpu": (16, 16), "cuda": (32, 32)},
    heads=2,
    names=(*SWEEP, RADIAL),
    flops={"cpu": 4.5e10, "cuda": 2e14},
    rounds=7,
)
LONG = Sweep(  # the grid of a Wan-like clip, as long as radial attention is made for: 100 s per dtype on 2 cores
    workload="ltx-2b-704p",
    frames=(8, 16, 32, 64, 128),
    tokens={"cpu": (22, 40), "cuda": (45, 80)},
    heads=1,
    names=("dense", "window", RADIAL),
    flops={"cpu": 3e11, "cuda": 2e14},
    rounds=5,
)


@dataclass
class _Entry:
    """One mask at one length, computed by one provider."""

    name: str
    job: Job
    provider: str
    contender: Contender
    error_ratio: float | None = None


def run(options: Options, journal: Journal, watch: Watch) -> None:
    dtypes = [DTYPES[name] for name in options.dtypes or BOTH]
    for one in (EVERY, LONG):
        sweep(journal, watch, options.device, dtypes, one, until=options.until)
    grid_masks.sweep(journal, watch, options.device, dtypes, until=options.until)


def sweep(
    journal: Journal,
    watch: Watch,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    of: Sweep = EVERY,
    *,
    until: float = math.inf,
    flex: bool = True,
) -> None:
    """Measures every mask at every length; rows of an interrupted race are kept.

    Args:
        flex: teacher forcing by FlexAttention too, as models are trained with it: compiled, on padded sequences.
        until: of time.monotonic(); nothing begins after it, but the fewest rounds of a race.
    """
    for dtype in dtypes:
        with watch.part("What a mask costs"):
            begin = len(journal.rows)
            try:
                _sweep_one(journal, watch, device, dtype, of, until=until, flex=flex)
            finally:
                watch.done(journal.rows[begin:])


def _shapes(device: str, of: Sweep) -> list[Shape]:
    kind, whole = torch.device(device).type, load()[of.workload].shape()
    rows, columns = of.tokens[kind]
    heads = of.heads if kind == "cpu" else whole.H
    return [Shape(B=1, T=T, rows=rows, columns=columns, H=heads, G=heads, D=whole.D) for T in of.frames]


def _sweep_one(
    journal: Journal, watch: Watch, device: str, dtype: torch.dtype, of: Sweep, *, until: float, flex: bool
) -> None:
    what, entries = f"masks, {DTYPE_NAMES[dtype]}", list[_Entry]()
    for shape in _shapes(device, of):
        if time.monotonic() > until:
            row = blank(make("video_attention", load()[of.workload], dtype=dtype, device=device, shape=shape))
            row = replace(row, case=f"{MASKS}all", provider="all", status="skipped")
            journal.add([replace(row, reason=f"{LATE}: measure it with `vdcore bench masks`")])
            continue
        watch.doing(f"{what}: warming up {shape.T} frames")
        entries += _entries(device, dtype, shape, of, flex)
    watch.doing(f"{what}: {of.rounds} rounds of {len(entries)} calls")
    contenders = {f"{e.provider} {e.name} {e.job.shape.T}": e.contender for e in entries}
    try:
        race(contenders, dict.fromkeys(contenders, of.rounds), clock_for(device), until)
    finally:
        journal.add(_row(entry) for entry in entries if entry.contender.samples)


def _entries(device: str, dtype: torch.dtype, shape: Shape, of: Sweep, flex: bool) -> list[_Entry]:
    """Every mask on every provider that supports it, after warm-up, checked against the reference."""
    kind, entries, tensors = torch.device(device).type, list[_Entry](), Tensors()
    threads = torch.get_num_threads() if kind == "cpu" else 1
    windows = {RADIAL: GridMask.radial(shape.rows, shape.columns)}
    for name in of.names:
        given = SWEEP.get(name, FrameMask.full())
        chosen: dict[str, Any] = {"mask": given if isinstance(given, FrameMask) else given(shape.T)}
        chosen["grid_mask"] = windows.get(name)
        job = make("video_attention", load()[of.workload], dtype=dtype, device=device, shape=shape, **chosen)
        if job.forward_flops() > of.flops[kind] * threads:
            continue
        tensors = tensors or job.tensors()
        calls = {"vdcore": _call(job, tensors, vdcore.video_attention)}
        whole = 4.0 * shape.D * shape.H * shape.B * (shape.T * shape.S) ** 2
        if 0 < whole <= SDPA_FLOPS[kind] * threads:
            variant = "dense mask" if masked(job) else "strided"
            calls["sdpa"] = _call(job, tensors, function_of(job, "sdpa", variant))
        if flex and name == FORCED:
            calls |= _flex(job, tensors)
        ratios = _judge(job, tensors, [call(None) for call in calls.values()])
        entries += [
            _Entry(name, job, provider, Contender(call), ratio)
            for (provider, call), ratio in zip(calls.items(), ratios)
        ]
    return entries


def _flex(job: Job, tensors: Tensors) -> dict[str, Callable[[Any], Tensor]]:
    peer = next(peer for peer in PEERS if peer.name == "flex")
    return {} if peer.why_not(job) else {"flex": _call(job, tensors, peer.variants(job)["padded"]())}


def _call(job: Job, tensors: Tensors, function: Function) -> Callable[[Any], Tensor]:
    """Of what a contender has prepared, which is nothing."""
    arguments = job.arguments(tensors)

    def call(_: Any) -> Tensor:
        with torch.no_grad():
            return function(**arguments)

    return call


def _judge(job: Job, tensors: Tensors, results: Sequence[Tensor]) -> list[float]:
    """The error ratios of the last frame of one head, which is a problem of its own."""
    T = job.shape.T
    q, k, v = (x[..., :1, :] for x in job.qkv(tensors))
    masks = {name: x for name, x in job.arguments(tensors).items() if name in ("mask", "grid")}
    piece: dict[str, Any] = {"q": q[:, -1:], "k": k, "v": v, **masks, "q_start": T - 1}
    wide: dict[str, Any] = {name: x.double() if isinstance(x, Tensor) else x for name, x in piece.items()}
    exact = vdcore.video_attention(**wide, backend="reference")
    forms = [form(**piece) for form in TORCH_FORMS[job.op].values()]
    return [error_ratio(out[:, -1:, :, :1], exact, forms).worst for out in results]


def _row(entry: _Entry) -> Row:
    return blank(entry.job).measured(
        entry.contender.spread,
        case=MASKS + entry.name,
        provider=entry.provider,
        variant={"vdcore": "", "flex": "padded"}.get(entry.provider, "dense mask"),
        reason=mask_text(entry.job.grid_mask or entry.job.mask),
        error_ratio=entry.error_ratio,
    )


# ---- Tables ----

HEADER: tuple[str, ...] = ("mask", "frames", "visible", "vdcore", "time per visible pair", "relative to dense")
HEADER += ("SDPA, dense mask", "speed-up", "error")
LEGEND = (
    "Forward. Time per visible pair: the time over the number of (query, key) pairs of all heads that the mask leaves "
    "visible. Relative to dense: that, over the same of dense attention at the greatest length measured, in one race."
)


def _pair(row: Row) -> float:
    """Seconds per visible pair: a pair takes 4 D operations."""
    assert row.p50 and row.flops
    return row.p50 / (row.flops / (4 * row.shape["D"]))


def _races(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.case.startswith(MASKS) and row.status == "ok" and row.p50:
            s = row.shape
            title = f"{row.dtype}, {row.device}: {s['S']} tokens per frame, {s['H']} x {s['D']} channels"
            found.setdefault(title, []).append(row)
    return found


def tables(rows: Sequence[Row]) -> dict[str, list[tuple[str, ...]]]:
    """Cells as :data:`HEADER` names them, by a title: one table per race."""
    made = {}
    for title, group in _races(rows).items():
        ours = [row for row in group if row.provider == "vdcore"]
        theirs = {(row.case, row.x): row for row in group if row.provider == "sdpa"}
        flex = [row for row in group if row.provider == "flex"]
        dense = max((row for row in ours if row.case == f"{MASKS}dense"), key=lambda row: row.x or 0, default=None)
        made[title] = [_cells(row, dense, theirs.get((row.case, row.x))) for row in ours]
        made[title] += [_cells(row, dense, None) for row in flex]
    return made


def _cells(row: Row, dense: Row | None, sdpa: Row | None) -> tuple[str, ...]:
    assert row.p50 and row.flops and row.x
    s = row.shape
    pairs = row.flops / (4 * s["D"] * s["H"] * s["B"])
    name = row.case.removeprefix(MASKS) + (", FlexAttention, padded" if row.provider == "flex" else "")
    return (
        f"{name} ({row.reason})" if row.reason else name,
        f"{row.x:g}",
        f"{pairs / (s['S'] * row.x) ** 2:.1%}",
        seconds_text(row.p50),
        f"{_pair(row) * 1e9:.3g} ns",
        "-" if dense is None else f"{_pair(row) / _pair(dense):.2f}",
        "-" if sdpa is None or not sdpa.p50 else seconds_text(sdpa.p50),
        "-" if sdpa is None or not sdpa.p50 else f"{sdpa.p50 / row.p50:.1f}x",
        "-" if row.error_ratio is None else f"{row.error_ratio:.2f}",
    )


# ---- The picture ----


def picture(rows: Sequence[Row]) -> bytes | None:
    """Time against frames of the races that have radial attention at four lengths or more; None: there is none."""
    found = {title: _curves(race) for title, race in _races(rows).items()}
    found = {title: curves for title, curves in found.items() if len(curves.get(RADIAL, ())) >= 4}
    if not found:
        return None
    figure, axes = new_plot(5.2 * len(found), 4.6, columns=len(found))
    for axis, (title, curves) in zip(axes[0], found.items()):
        for name, color, marker in (("dense", NAIVE, "s"), ("window", BEST, "^"), (RADIAL, OURS, "o")):
            points = curves.get(name, {})
            if points:
                axis.plot([*points], [row.p50 for row in points.values()], color=color, marker=marker, label=name)
        _guides(axis, curves)
        frames = [*curves[RADIAL]]
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(frames, [f"{x:g}" for x in frames])
        axis.set_xlabel("frames")
        axis.set_ylabel("seconds per call")
        axis.set_title(title, fontsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7.5)
    return png(figure)


def _curves(race: Sequence[Row]) -> dict[str, dict[float, Row]]:
    """Own rows by mask and number of frames."""
    found: dict[str, dict[float, Row]] = {}
    for row in sorted(race, key=lambda row: row.x or 0):
        if row.provider == "vdcore" and row.x:
            found.setdefault(row.case.removeprefix(MASKS), {})[row.x] = row
    return found


def _guides(axis: Any, curves: dict[str, dict[float, Row]]) -> None:
    """From radial's first time on: in proportion to its visible pairs, and to T log T.

    Windows end at whole tokens, 3 x 3 of them, so that pairs of small grids outgrow T log T.
    """
    points = curves[RADIAL]
    frames, first = [*points], points[min(points)]
    assert first.p50 and first.flops
    pairs = [first.p50 * (row.flops or 0.0) / first.flops for row in points.values()]
    logs = [first.p50 * T * math.log2(T) / (frames[0] * math.log2(frames[0])) for T in frames]
    axis.plot(frames, pairs, color=OURS, linestyle=":", linewidth=1, label="radial's visible pairs")
    axis.plot(frames, logs, color=COPY, linestyle="--", linewidth=1, label="T log T")
