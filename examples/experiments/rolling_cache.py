"""Rolling cache: 240 frames at a constant time per frame, equal to recomputing every frame under the same mask.

A model that sees chunks of the past draws chunk after chunk. Keys and values of the frames that it still sees lie in a
ring (rolling cache), so that a new chunk costs the same wherever in the stream it is. Beside it the same video by
recomputing all frames so far for every chunk, whose time grows. Both must agree, by the error that float32 itself has
against float64 (an error ratio of at most 1).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.fit import random_model
from experiments.show import OFF, ON, draw_curves, new_plot, progress, save_plot
from vdcore.diffusion import roll, roll_by_recomputing
from vdcore.diffusion.training import process_for
from vdcore.mask import FrameMask
from vdcore.models import VDiTConfig
from vdcore.testing import error_ratio
from vdcore_bench.report.table import Table

NAME = "rolling_cache"
CONSTANT = 1.2  # most that the last quarter's time may be over the first full ring's


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment: frames in all, of ``size`` pixels, the model, and the number of timed rolls."""

    frames: int = 240
    size: tuple[int, int] = (16, 24)
    width: int = 64
    depth: int = 3
    steps: int = 2
    rolls: int = 5
    mask: FrameMask = FrameMask(past=3, future=0, chunk=4, sink=4)

    @property
    def chunks(self) -> int:
        return self.frames // self.mask.chunk


def run(out: Path, settings: Settings = Settings()) -> Figure:
    """Rolls, recomputes in float32 and in float64, and writes curves, a table and the figure into ``out``."""
    started = time.monotonic()
    # Equality and time do not depend on training.
    model = random_model(
        VDiTConfig(
            in_channels=3,
            patch=(1, 4, 4),
            width=settings.width,
            depth=settings.depth,
            heads=4,
            mask=settings.mask,
            position="rope",
            qk_norm=True,
        )
    )
    process = process_for("sample")
    random = torch.Generator().manual_seed(1)
    shape = (1, 3, settings.mask.chunk, *settings.size)
    noises = [torch.randn(shape, generator=random) for _ in range(settings.chunks)]
    memory = model.new_cache(1, *settings.size).nbytes
    with progress(NAME) as track:
        list(roll(model, process, noises[:2], settings.steps))  # starts threads and loads code
        rolls = []
        for _ in track("rolling", settings.rolls):
            cache = model.new_cache(1, *settings.size)
            ours, taken = _timed(roll(model, process, noises, settings.steps, cache), range(settings.chunks))
            rolls.append(taken)
        seconds = [median(times) for times in zip(*rolls)]
        again = roll_by_recomputing(model, process, noises, settings.steps)
        whole, theirs = _timed(again, track("recomputing", settings.chunks))
        in_float64 = roll_by_recomputing(model.double(), process, [x.double() for x in noises], settings.steps)
        exact, _ = _timed(in_float64, track("in float64", settings.chunks))
    ratio = error_ratio(ours, exact, [whole]).worst
    mask, quarter = settings.mask, max(settings.chunks // 4, 1)
    full = (mask.past or 0) + 1 + -(-mask.sink // mask.chunk)  # chunks until the ring is full
    growth, growth_recomputing = (median(s[-quarter:]) / median(s[full : full + quarter]) for s in (seconds, theirs))
    curves = {
        "recomputing all frames": [1e3 * s / mask.chunk for s in theirs],
        "rolling cache": [1e3 * s / mask.chunk for s in seconds],
    }
    per_frame = {name: median(ms[-quarter:]) for name, ms in curves.items()}
    return Figure(
        name=NAME,
        claim=f"The time of a new frame is constant over {settings.frames} frames, in constant memory, and what is "
        "drawn equals recomputing all frames under the same mask, within the tolerance rule.",
        numbers={
            "time_growth": growth,
            "milliseconds_per_frame": per_frame["rolling cache"],
            "milliseconds_per_frame_recomputing_at_the_end": per_frame["recomputing all frames"],
            "error_ratio": ratio,
            "largest_difference": (ours - whole).abs().max().item(),
            "cache_bytes": cache.nbytes,
        },
        compared_with={
            "most_time_growth": CONSTANT,
            "time_growth_of_recomputing": growth_recomputing,
            "error_ratio_allowed": 1.0,
            "largest_value": exact.abs().max().item(),
            "cache_bytes_before_the_first_frame": memory,
        },
        passed=growth <= CONSTANT and ratio <= 1 and cache.nbytes == memory,
        size=f"random weights: width {settings.width}, {settings.depth} blocks, {settings.size[0]}x{settings.size[1]} "
        f"pixels in patches of 4, {mask}, {settings.steps} steps per chunk, times of {settings.rolls} rolls, "
        f"{torch.get_num_threads()} threads; time is the processor's, so that other programs do not count; "
        f"{time.monotonic() - started:.0f} s",
        files=[_plot(out, curves, mask.chunk)],
        table=_table(curves, mask.chunk),
        captions={f"{NAME}.png": "Processor time of a new frame by its place in the video."},
    ).save(out)


def _timed(chunks: Iterator[Tensor], ticks: Iterable[int]) -> tuple[Tensor, list[float]]:
    """The video, and the processor's seconds per chunk."""
    parts, seconds = [], []
    for _ in ticks:
        begin = time.process_time()
        parts.append(next(chunks))
        seconds.append(time.process_time() - begin)
    return torch.cat(parts, 2), seconds


def _plot(out: Path, curves: dict[str, list[float]], chunk: int) -> str:
    figure, axes = new_plot(7, 3.6)
    frames = [(i + 1) * chunk for i in range(len(curves["rolling cache"]))]
    draw_curves(axes[0][0], frames, curves, (OFF, ON), xlabel="frame", ylabel="ms per new frame", ylim=(0, None))
    return save_plot(figure, out / f"{NAME}.png")


def _table(curves: dict[str, list[float]], chunk: int) -> Table:
    theirs, ours = curves.values()
    count, rows = len(ours), []
    for i in sorted({0, count // 4, count // 2, 3 * count // 4, count - 1}):
        near = slice(max(i - 2, 0), i + 3)
        rows.append(((i + 1) * chunk, median(ours[near]), median(theirs[near])))
    header = ("frame", "rolling cache, ms", "recomputing, ms")
    return Table.of(header, rows, note="Processor time per new frame, median of five chunks.")
