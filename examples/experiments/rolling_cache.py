"""Rolling cache: 240 frames at a constant time per frame, equal to recomputing every frame under the same mask."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.show import OFF, ON, new_plot, progress, save_plot, save_table
from vdcore.diffusion import Process, roll, roll_by_recomputing
from vdcore.diffusion.training import process_for
from vdcore.mask import FrameMask
from vdcore.models import VDiT, VDiTConfig
from vdcore.testing import error_ratio

NAME = "rolling_cache"
CONSTANT = 1.2  # most that the last quarter's time may be over the first full ring's


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment: frames in all, of ``size`` pixels, the model, and rolls whose times are taken."""

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


def new_model(settings: Settings) -> VDiT:
    """Random weights, all gates of AdaLN-Zero open: equality and time do not depend on training."""
    torch.manual_seed(0)
    config = VDiTConfig(
        in_channels=3, patch=(1, 4, 4), width=settings.width, depth=settings.depth, heads=4,
        mask=settings.mask, position="rope", qk_norm=True,
    )  # fmt: skip
    model = VDiT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model


def run(out: Path, settings: Settings = Settings()) -> Figure:
    """Rolls, recomputes in float32 and in float64, and writes curves, a table and the figure into ``out``."""
    started = time.monotonic()
    model, process = new_model(settings), process_for("sample")
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
        whole, theirs = _timed(
            roll_by_recomputing(model, process, noises, settings.steps), track("recomputing", settings.chunks)
        )
        exact = _exact(model, process, noises, settings, track("in float64", settings.chunks))
    ratio = error_ratio(ours, exact, [whole]).worst
    full = (
        (settings.mask.past or 0) + 1 + -(-settings.mask.sink // settings.mask.chunk)
    )  # chunks until the ring is full
    quarter = max(settings.chunks // 4, 1)
    growth = median(seconds[-quarter:]) / median(seconds[full : full + quarter])
    per_frame = settings.mask.chunk
    figure = Figure(
        name=NAME,
        claim=f"The time of a new frame is constant over {settings.frames} frames, in constant memory, and what is "
        "drawn equals recomputing all frames under the same mask, within the tolerance rule.",
        numbers={
            "time_growth": growth,
            "milliseconds_per_frame": 1e3 * median(seconds[-quarter:]) / per_frame,
            "milliseconds_per_frame_recomputing_at_the_end": 1e3 * median(theirs[-quarter:]) / per_frame,
            "error_ratio": ratio,
            "largest_difference": (ours - whole).abs().max().item(),
            "cache_bytes": cache.nbytes,
        },
        compared_with={
            "most_time_growth": CONSTANT,
            "time_growth_of_recomputing": median(theirs[-quarter:]) / median(theirs[full : full + quarter]),
            "error_ratio_allowed": 1.0,
            "largest_value": exact.abs().max().item(),
            "cache_bytes_before_the_first_frame": memory,
        },
        passed=growth <= CONSTANT and ratio <= 1 and cache.nbytes == memory,
        size=f"random weights: width {settings.width}, {settings.depth} blocks, {settings.size[0]}x{settings.size[1]} "
        f"pixels in patches of 4, {settings.mask}, {settings.steps} steps a chunk, times of {settings.rolls} rolls, "
        f"{torch.get_num_threads()} threads; time is the processor's, so that other programs do not count; "
        f"{time.monotonic() - started:.0f} s",
        files=[_plot(out, seconds, theirs, per_frame), _table(out, seconds, theirs, per_frame)],
    )
    figure.save(out)
    return figure


def _timed(chunks: Iterator[Tensor], ticks: Iterable[int]) -> tuple[Tensor, list[float]]:
    """The video, and the processor's seconds of every chunk."""
    parts, seconds = [], []
    for _ in ticks:
        begin = time.process_time()
        parts.append(next(chunks))
        seconds.append(time.process_time() - begin)
    return torch.cat(parts, 2), seconds


def _exact(model: VDiT, process: Process, noises: list[Tensor], settings: Settings, ticks: Iterable[int]) -> Tensor:
    """Recomputed in float64; of the past only what the mask lets the new chunk depend on would matter, all is run."""
    double = new_model(settings).double()
    double.load_state_dict(model.state_dict())
    chunks = roll_by_recomputing(double, process, [x.double() for x in noises], settings.steps)
    return torch.cat([next(chunks) for _ in ticks], 2)


def _plot(out: Path, ours: list[float], theirs: list[float], chunk: int) -> str:
    figure, axes = new_plot(7, 3.6)
    frames = [(i + 1) * chunk for i in range(len(ours))]
    for seconds, colour, label in ((theirs, OFF, "recomputing all frames"), (ours, ON, "rolling cache")):
        axes[0][0].plot(frames, [1e3 * s / chunk for s in seconds], color=colour, label=label)
    axes[0][0].set(xlabel="frame", ylabel="ms for a new frame", ylim=(0, None))
    axes[0][0].legend()
    return save_plot(figure, out / f"{NAME}.png")


def _table(out: Path, ours: list[float], theirs: list[float], chunk: int) -> str:
    rows = []
    for i in sorted({0, len(ours) // 4, len(ours) // 2, 3 * len(ours) // 4, len(ours) - 1}):
        near = slice(max(i - 2, 0), i + 3)
        rows.append(((i + 1) * chunk, *(1e3 * median(s[near]) / chunk for s in (ours, theirs))))
    header = ("frame", "rolling cache, ms", "recomputing, ms")
    return save_table(out / f"{NAME}.md", header, rows, "Processor time of a new frame, median of five chunks.")
