"""Splicing: 64 frames with memory for 8. Peak memory against the whole clip's, and how visible the seams are.

A long video is drawn in chunks of 8 frames, each of which is given the last two frames of the chunk before and goes on
from them (spliced), beside two other ways: all chunks in one draw with their overlaps cross-faded (blended), and chunks
that know nothing of one another (cut). A seam is visible where the frame that begins a chunk changes more than others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments import train_sample
from experiments.figure import Figure
from experiments.show import OFF, ON, THIRD, draw_curves, new_plot, progress, save_plot
from vdcore.diffusion import blended, make_sampler, runs, sample, splice
from vdcore.diffusion.training import Recipe, Trained, load_trained, process_for
from vdcore.models import VDiT
from vdcore.video import contact_sheet, write_video
from vdcore_bench.report.table import Table

NAME = "splicing"
CHUNK, OVERLAP, FRAMES = 8, 2, 64
MEMORY_SHARE, SEAM = 0.25, 1.5  # the claim: at most this share of the whole clip's peak, this much change at a seam
Peaks = dict[str, dict[int, int]]  # whole or spliced -> frames -> bytes


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment.

    Args:
        frames: lengths whose memory is measured; the last one is the claim's.
        together: videos drawn at once where memory is measured.
        videos: long videos whose seams are measured.
        steps: of the scheduler for these.
    """

    frames: Sequence[int] = (8, 16, 32, FRAMES)
    together: int = 16
    videos: int = 8
    steps: int = 12


def peak_memory(frames: int, videos: int, spliced: bool) -> int:
    """Peak bytes of drawing videos of the default model's, beyond its weights. To be called in a fresh process."""
    from vdcore_bench.measure.machine import returning_memory
    from vdcore_bench.measure.memory import peak_of

    recipe = Recipe()
    with returning_memory():
        model, process = VDiT(recipe.model).eval(), process_for(recipe.target)
        shape = (videos, recipe.model.in_channels, *recipe.size)

        def call(frames: int = frames) -> list[Tensor]:
            sampler = make_sampler(model, process, shape, 1, generator=torch.Generator().manual_seed(0))
            if spliced:
                return list(splice(sampler, frames, CHUNK, OVERLAP))
            return [sampler(torch.arange(frames))]

        call(CHUNK)  # starts threads and loads code
        return peak_of(call).bytes


def change(video: Tensor) -> Tensor:
    """Mean absolute difference of consecutive frames, ``(T-1,)``, over the batch."""
    return video.diff(dim=2).abs().mean((0, 1, 3, 4))


def seam_ratio(video: Tensor, seams: Sequence[int], patch: int = 1) -> float:
    """Change into the frames that begin a chunk, over the change into all others that begin a token.

    Inside of a token, of ``patch`` frames, frames change less, whether it begins a chunk or not.
    """
    steps = change(video)
    into = torch.arange(1, len(steps) + 1)
    at = torch.isin(into, torch.tensor(seams))
    return (steps[at].mean() / steps[~at & (into % patch == 0)].mean()).item()


def run(out: Path, settings: Settings = Settings()) -> Figure:
    """Uses the model of ``train_sample``, and trains it first if it is not there."""
    from vdcore_bench.measure.memory import in_process

    started = time.monotonic()
    trained = _trained(out)
    memory: Peaks = {"whole": {}, "spliced": {}}
    videos, ratios = {}, {}
    with progress(NAME) as track:
        points = [(kind, n) for n in settings.frames for kind in memory]
        for i in track("peak memory", len(points)):
            kind, n = points[i]
            memory[kind][n] = in_process(peak_memory, n, settings.together, kind == "spliced")
        kinds = ("spliced", "blended", "cut")
        for i in track("long videos", len(kinds)):
            videos[kinds[i]], seams = long_videos(trained, kinds[i], settings.videos, settings.steps)
            ratios[kinds[i]] = seam_ratio(videos[kinds[i]], seams, trained.recipe.model.patch[0])
    n = settings.frames[-1]
    share = memory["spliced"][n] / memory["whole"][n]
    return Figure(
        name=NAME,
        claim=f"{FRAMES} frames in chunks of {CHUNK} with {OVERLAP} frames of overlap need at most {MEMORY_SHARE:.0%} "
        f"of the whole clip's memory, and change at a chunk's first frame at most {SEAM} times as much as elsewhere.",
        numbers={
            "memory_share": share,
            "peak_bytes_spliced": memory["spliced"],
            "peak_bytes_whole": memory["whole"],
            "change_at_seams": ratios["spliced"],
            "change_at_seams_blended": ratios["blended"],
        },
        compared_with={
            "most_memory_share": MEMORY_SHARE,
            "most_change_at_seams": SEAM,
            "change_at_seams_of_chunks_without_overlap": ratios["cut"],
        },
        passed=share <= MEMORY_SHARE and ratios["spliced"] <= SEAM < ratios["cut"],
        size=f"memory: {settings.together} videos of the default model's size at once, untrained, one step, "
        f"every point in a fresh process, beyond the weights; seams: {settings.videos} videos of {FRAMES} frames of "
        f"the model of train_sample ({trained.step} steps); {time.monotonic() - started:.0f} s",
        files=[_plot(out, memory, videos), *_videos(out, videos)],
        table=_table(memory),
        captions={
            f"{NAME}.png": "Left: peak memory by length, of a whole clip and spliced. Right: change from each frame to "
            "the next; without overlap it jumps wherever a chunk begins.",
            f"{NAME}_frames.png": "One video in each row, every fourth frame.",
            f"{NAME}.gif": "From left to right: spliced, blended, cut.",
        },
    ).save(out)


def long_videos(trained: Trained, kind: str, count: int, steps: int) -> tuple[Tensor, list[int]]:
    """``(count, 3, FRAMES, H, W)`` in [0, 1], and where its chunks begin."""
    recipe = trained.recipe
    process, random = process_for(recipe.target, recipe.sampling_shift), torch.Generator().manual_seed(0)
    shape, how = (count, recipe.model.in_channels, *recipe.size), runs.how_to_sample(steps, random, spliced=True)
    if kind == "blended":
        # The whole video in one draw; chunks begin where they are half faded in.
        noise = torch.randn(count, shape[1], FRAMES, *recipe.size, generator=random)
        video = sample(blended(trained.model, CHUNK, CHUNK // 2), process, noise, steps, **how)
        seams = range(CHUNK // 2 + CHUNK // 4, FRAMES, CHUNK // 2)
    else:
        overlap = OVERLAP if kind == "spliced" else 0
        sampler = make_sampler(trained.model, process, shape, steps, **how)
        video = torch.cat(list(splice(sampler, FRAMES, CHUNK, overlap)), 2)
        seams = range(CHUNK, FRAMES, CHUNK - overlap)
    return ((video + 1) / 2).clamp(0, 1), list(seams)


def _trained(out: Path) -> Trained:
    path = train_sample.checkpoint(out)
    if path.exists():
        trained = load_trained(path)
        if trained.step >= trained.recipe.steps:
            return trained
    train_sample.run(out)
    return load_trained(path)


def _plot(out: Path, memory: Peaks, videos: dict[str, Tensor]) -> str:
    figure, axes = new_plot(11, 3.6, columns=2)
    left, right = axes[0]
    peaks = {kind: [size / 2**20 for size in points.values()] for kind, points in memory.items()}
    draw_curves(left, list(memory["whole"]), peaks, (OFF, ON), marker="o", xlabel="frames", ylabel="peak memory, MiB")
    left.set_ylim(0, None)
    left.set_title("Drawing a video, beyond the weights", fontsize=10, loc="left")
    changes = {kind: change(video).tolist() for kind, video in videos.items()}
    draw_curves(right, range(1, FRAMES), changes, (ON, THIRD, OFF), xlabel="frame", ylabel="mean |x(t) - x(t-1)|")
    right.set_ylim(0, None)
    for seam in range(CHUNK, FRAMES, CHUNK - OVERLAP):
        right.axvline(seam, color="black", linewidth=0.4, linestyle=":")
    right.set_title("Change from frame to frame (dotted: chunks of the spliced)", fontsize=10, loc="left")
    return save_plot(figure, out / f"{NAME}.png")


def _table(memory: Peaks) -> Table:
    peaks = [(n, whole / 2**20, memory["spliced"][n] / 2**20) for n, whole in memory["whole"].items()]
    rows = [(n, f"{whole:.1f}", f"{spliced:.1f}", f"{spliced / whole:.2f}") for n, whole, spliced in peaks]
    header = ("frames", "whole, MiB", "spliced, MiB", "spliced / whole")
    return Table.of(header, rows, note="Peak memory of drawing a video, beyond the model's weights.")


def _videos(out: Path, videos: dict[str, Tensor]) -> list[str]:
    first = [video[0] for video in videos.values()]
    sheet = contact_sheet(out / f"{NAME}_frames.png", first, labels=list(videos), frames=FRAMES // 4)
    gif = write_video(out / f"{NAME}.gif", torch.cat(first, -1), 8, scale=4)
    mp4 = write_video(out / f"{NAME}.mp4", torch.cat(list(videos["spliced"][:6]), -1), 8, scale=6)
    return [sheet.name, gif.name, mp4.name]
