"""Splicing: 64 frames with memory for 8. Peak memory against the whole clip's, and what is seen of the seams."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdcore.demo.figure import Figure
from vdcore.demo.show import OFF, ON, THIRD, new_plot, progress, save_plot, save_table
from vdcore.demo.train_sample import FOLDER
from vdcore.diffusion import blended, drawing, runs, sample, splice
from vdcore.diffusion.training import Recipe, Trained, load_trained, process_for
from vdcore.models import VDiT
from vdcore.video import contact_sheet, write_video

NAME = "splicing"
CHUNK, OVERLAP, FRAMES = 8, 2, 64
MEMORY_SHARE, SEAM = 0.25, 1.5  # the claim: at most this share of the whole clip's peak, this much change at a seam


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
            draw = drawing(model, process, shape, 1, generator=torch.Generator().manual_seed(0))
            if spliced:
                return list(splice(draw, frames, CHUNK, OVERLAP))
            return [draw(torch.arange(frames))]

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
    """Uses the model in ``out/train``, and trains one there if there is none."""
    from vdcore_bench.measure.memory import in_process

    started = time.monotonic()
    trained = _trained(out)
    memory: dict[str, dict[int, int]] = {"whole": {}, "spliced": {}}
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
    files = [
        _plot(out, memory, videos),
        _table(out, memory),
        contact_sheet(
            out / f"{NAME}_frames.png", [v[0] for v in videos.values()], labels=list(videos), frames=FRAMES // 4
        ).name,
        write_video(out / f"{NAME}.gif", torch.cat([v[0] for v in videos.values()], -1), 8, scale=4).name,
        write_video(out / f"{NAME}.mp4", torch.cat(list(videos["spliced"][:6]), -1), 8, scale=6).name,
    ]
    figure = Figure(
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
        files=files,
    )
    figure.save(out)
    return figure


def long_videos(trained: Trained, kind: str, count: int, steps: int) -> tuple[Tensor, list[int]]:
    """``(count, 3, FRAMES, H, W)`` in [0, 1], and where its chunks begin."""
    recipe = trained.recipe
    process, random = process_for(recipe.target, recipe.sampling_shift), torch.Generator().manual_seed(0)
    shape = (count, recipe.model.in_channels, *recipe.size)
    if kind == "blended":
        # The whole video in one draw; chunks begin where they are half faded in.
        noise = torch.randn(count, shape[1], FRAMES, *recipe.size, generator=random)
        video = sample(blended(trained.model, CHUNK, CHUNK // 2), process, noise, steps)
        seams = list(range(CHUNK // 2 + CHUNK // 4, FRAMES, CHUNK // 2))
    else:
        overlap = OVERLAP if kind == "spliced" else 0
        draw = drawing(trained.model, process, shape, steps, generator=random)
        video = torch.cat(list(splice(draw, FRAMES, CHUNK, overlap)), 2)
        seams = list(range(CHUNK, FRAMES, CHUNK - overlap))
    return ((video + 1) / 2).clamp(0, 1), seams


def _trained(out: Path) -> Trained:
    path = out / FOLDER / runs.CHECKPOINT
    if path.exists():
        trained = load_trained(path)
        if trained.step >= trained.recipe.steps:
            return trained
    from vdcore.demo import train_sample

    train_sample.run(out)
    return load_trained(path)


def _plot(out: Path, memory: dict[str, dict[int, int]], videos: dict[str, Tensor]) -> str:
    figure, axes = new_plot(11, 3.6, columns=2)
    left, right = axes[0]
    for (kind, points), colour in zip(memory.items(), (OFF, ON)):
        left.plot(list(points), [b / 2**20 for b in points.values()], marker="o", color=colour, label=kind)
    left.set(xlabel="frames", ylabel="peak memory, MiB", ylim=(0, None))
    left.set_title("Drawing a video, beyond the weights", fontsize=10, loc="left")
    left.legend()
    for (kind, video), colour in zip(videos.items(), (ON, THIRD, OFF)):
        right.plot(range(1, FRAMES), change(video).tolist(), color=colour, label=kind, linewidth=1)
    for seam in range(CHUNK, FRAMES, CHUNK - OVERLAP):
        right.axvline(seam, color="black", linewidth=0.4, linestyle=":")
    right.set(xlabel="frame", ylabel="mean |x(t) - x(t-1)|", ylim=(0, None))
    right.set_title("Change from frame to frame (dotted: chunks of the spliced)", fontsize=10, loc="left")
    right.legend(fontsize=8)
    return save_plot(figure, out / f"{NAME}.png")


def _table(out: Path, memory: dict[str, dict[int, int]]) -> str:
    rows = [
        (n, f"{memory['whole'][n] / 2**20:.1f}", f"{memory['spliced'][n] / 2**20:.1f}",
         f"{memory['spliced'][n] / memory['whole'][n]:.2f}")
        for n in memory["whole"]
    ]  # fmt: skip
    header = ("frames", "whole, MiB", "spliced, MiB", "spliced / whole")
    return save_table(out / f"{NAME}.md", header, rows, "Peak memory of drawing a video, beyond the model's weights.")
