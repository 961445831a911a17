"""Motion paths: where full 3D attention looks for an object that moves, and why attention at one position loses it.

Noisy clips of a textured square at constant velocity are denoised by a small net with full 3D attention. Frames repeat
the square, so the net gains by looking where it was and where it will be. For the object's token in the middle frame,
the weights ``exp(scale q . k - lse)`` of the last layer are recomputed from its q and k and the lse that the operator
returned. They are held against the slanted line ``x + v dt``, the same position, and any token alike.

Temporal attention at one position sees the object only while its middle stays in the patch: ``|dt| <= patch / (2 v)``.
A net with that alone is trained in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.net import Attention, VideoNet
from experiments.show import GREY, OFF, ON, Track, new_plot, progress, save_plot, save_table
from vdcore.video import Background, Layers, Scene, contact_sheet
from vdcore.video.scenes import uniform

NAME = "motion_paths"
FRAMES, SIZE, PATCH = 9, (12, 32), 4  # frames; pixels; a patch is PATCH x PATCH of one frame
MIDDLE = FRAMES // 2
SPEEDS = (1.0, 2.0, 3.0)  # pixels a frame, to either side; trained between 0 and the last
NOISE = 0.5  # standard deviation, of values in [-1, 1]
TIMES_SAME, TIMES_ANY = 2.0, 5.0  # that the line has to outweigh the same position, and a token of the average


@dataclass(frozen=True)
class Budget:
    """How long each net is trained, and on how many clips of each speed it is measured."""

    steps: int = 800
    batch: int = 8
    lr: float = 3e-3
    width: int = 64
    clips: int = 96


def make_clips(velocity: Tensor, index: Sequence[int] | np.ndarray) -> tuple[Scene, Tensor]:
    """A square as large as a patch at each velocity ``(B,)``, and the token ``(B,)`` that it fills in the middle frame.

    So half a patch is what it can move before it is nearer to another token. Colours, texture, row and background are
    drawn from ``index``.
    """
    v = velocity.double().numpy()
    B, (H, W) = len(v), SIZE
    u = uniform(0, np.asarray(index), 16)
    rows, columns = H // PATCH, W // PATCH
    column, row = columns // 2 - (u[:, 0] < 0.5), np.floor(u[:, 1] * rows)
    middle = np.empty((B, FRAMES, 2))
    middle[..., 0] = (PATCH * column + (PATCH - 1) / 2)[:, None] + v[:, None] * (np.arange(FRAMES) - MIDDLE)
    middle[..., 1] = (PATCH * row + (PATCH - 1) / 2)[:, None]
    layers = Layers(
        center=middle[:, None],
        half=np.full((B, 1, 2), PATCH / 2),
        corner=np.zeros((B, 1)),
        colour=u[:, 2:8].reshape(B, 1, 2, 3),
        wave=(2 * np.pi / (4 + 4 * u[:, 8:10])).reshape(B, 1, 2),
        phase=2 * np.pi * u[:, 10:12].reshape(B, 1, 2),
    )
    shade = np.broadcast_to(0.3 + 0.4 * u[:, 12:14, None], (B, 2, 3))
    heading = 2 * np.pi * u[:, 14]
    wave = (np.stack((np.cos(heading), np.sin(heading)), -1) * 2 * np.pi / 24)[:, None]
    scene = Scene(Background(shade, wave, 2 * np.pi * u[:, 15:16]), layers, SIZE)
    return scene, torch.from_numpy(row * columns + column).long()


def new_net(kind: str, width: int) -> VideoNet:
    """Two blocks of full 3D attention, or of temporal attention at one position, each with its MLP."""
    return VideoNet((FRAMES, *SIZE), (PATCH, PATCH), width=width, blocks=2, layers=(kind,))


def noisy(video: Tensor, seed: int | torch.Generator) -> tuple[Tensor, Tensor]:
    """The clip in [-1, 1], and with noise."""
    random = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    clean = 2 * video - 1
    return clean, clean + NOISE * torch.randn(clean.shape, generator=random)


def train(net: VideoNet, budget: Budget, track: Track, label: str) -> None:
    """Squared error of the clean clip; the velocity is uniform between the highest speeds to either side."""
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=budget.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 30, 4 - 4 * n / budget.steps, 1))
    for _ in track(label, budget.steps):
        velocity = SPEEDS[-1] * (2 * torch.rand(budget.batch, generator=random) - 1)
        index = torch.randint(2**31, (budget.batch,), generator=random)
        clean, given = noisy(make_clips(velocity, index.numpy())[0].video, random)
        loss = (net(given) - clean).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class Look:
    """Where a net looks from an object of one velocity, and how well it denoises it.

    Args:
        map: ``(T, W')``, mean weight by frame and column in the row of the object, each clip shifted so that the query
            is at column ``W' / 2``.
        line, same: ``(T,)``, mean weight of the token within half a patch of ``x + v dt``, and of the same position.
        frame: ``(T,)``, mean weight of all tokens of a frame.
        error: mean squared error over the object's token in the middle frame.
    """

    map: Tensor
    line: Tensor
    same: Tensor
    frame: Tensor
    error: float


@torch.no_grad()
def look(net: VideoNet, speed: float, clips: int) -> Look:
    """Weights of the last attention layer, mean over heads and clips, from the object's token in the middle frame."""
    scene, token = make_clips(torch.full((clips,), speed), 2**31 + np.arange(clips))
    clean, given = noisy(scene.video, seed=1)
    x = net.tokens(given)
    last = max(i for i, block in enumerate(net.blocks) if isinstance(block, Attention))
    for block in net.blocks[:last]:
        x = block(x)
    layer = net.blocks[last]
    assert isinstance(layer, Attention)
    rows, columns = net.grid[1:]
    weights = layer.weights(x, MIDDLE, token).mean(1).unflatten(-1, (rows, columns))  # (B, T, rows, columns)
    row, column = token // columns, token % columns
    weights_in_row = weights[torch.arange(clips), :, row]  # (B, T, columns)
    shifts = (columns // 2 - column).tolist()
    aligned = torch.stack([w.roll(s, -1) for w, s in zip(weights_in_row, shifts)]).mean(0)
    dt = torch.arange(FRAMES) - MIDDLE
    away = torch.floor(
        (speed * dt + PATCH / 2) / PATCH
    ).long()  # columns from the query to the token that holds the line
    error = (net(given) - clean).square().unflatten(-1, (columns, PATCH)).unflatten(-3, (rows, PATCH))
    error = error[:, :, MIDDLE].mean((1, 3, 5))[torch.arange(clips), row, column].mean()
    return Look(
        map=aligned,
        line=aligned[torch.arange(FRAMES), columns // 2 + away],
        same=aligned[:, columns // 2],
        frame=weights.mean(0).sum((-1, -2)),
        error=error.item(),
    )


def limit(speed: float) -> float:
    """``patch / (2 v)``: for so many frames to either side the object's middle stays in its token."""
    return PATCH / (2 * speed)


def run(out: Path, budget: Budget = Budget()) -> Figure:
    """Trains both nets, measures where they look, and writes maps, a table and the figure into ``out``."""
    started = time.monotonic()
    found: dict[str, dict[float, Look]] = {}
    with progress(NAME) as track:
        for kind, label in (("full", "full 3D attention"), ("temporal", "temporal attention")):
            torch.manual_seed(0)
            net = new_net(kind, budget.width)
            train(net, budget, track, label)
            found[kind] = {speed: look(net, speed, budget.clips) for speed in (0.0, *SPEEDS)}
    shares = {speed: far_shares(found["full"][speed], speed) for speed in SPEEDS}
    files = [_plot(out, found), _table(out, found, shares), _sheet(out)]
    gains = {speed: found["temporal"][speed].error / found["full"][speed].error for speed in (0.0, *SPEEDS)}
    near = {speed: near_share(found["temporal"][speed], speed) for speed in SPEEDS}
    figure = Figure(
        name=NAME,
        claim="Full 3D attention learns to look along the slanted line x + v dt: beyond |dt| = patch / 2v, where "
        "attention at one position has lost the object, the token on the line outweighs the one at the same position "
        f"{TIMES_SAME:g} times at least and the average token {TIMES_ANY:g} times, at every speed; and temporal "
        "attention puts more on the frames within that limit than all frames alike would have.",
        numbers={
            "share_of_the_line": {f"v={v:g}": shares[v]["line"] for v in SPEEDS},
            "share_of_the_same_position": {f"v={v:g}": shares[v]["same"] for v in SPEEDS},
            "error_of_temporal_over_full": {f"v={v:g}": gains[v] for v in gains},
            "temporal_attention_within_the_limit": {f"v={v:g}": near[v][0] for v in SPEEDS},
        },
        compared_with={
            "share_of_any_token": 1 / (SIZE[0] // PATCH * SIZE[1] // PATCH),
            "times_same_position": TIMES_SAME,
            "times_any_token": TIMES_ANY,
            "limit_in_frames": {f"v={v:g}": limit(v) for v in SPEEDS},
            "temporal_attention_within_the_limit_if_alike": {f"v={v:g}": near[v][1] for v in SPEEDS},
        },
        passed=all(s["line"] >= max(TIMES_SAME * s["same"], TIMES_ANY * s["alike"]) for s in shares.values())
        and all(share > alike for share, alike in near.values()),
        size=f"toy world: {SIZE[0]}x{SIZE[1]} pixels, {FRAMES} frames, patches of {PATCH}x{PATCH}, a square of one, "
        f"noise of {NOISE:g}; nets of two layers of width {budget.width}, {budget.steps} steps of {budget.batch} "
        f"clips; {budget.clips} clips of each speed; {time.monotonic() - started:.0f} s in all",
        files=files,
    )
    figure.save(out)
    return figure


def far_shares(found: Look, speed: float) -> dict[str, float]:
    """Of the weight on frames with ``|dt| > patch / 2v``: the shares of line, same position, any token."""
    far = (torch.arange(FRAMES) - MIDDLE).abs() > limit(speed)
    total = found.frame[far].sum()
    return {
        "line": (found.line[far].sum() / total).item(),
        "same": (found.same[far].sum() / total).item(),
        "alike": 1 / (SIZE[0] // PATCH * SIZE[1] // PATCH),
    }


def near_share(found: Look, speed: float) -> tuple[float, float]:
    """The weight on frames with ``|dt| <= patch / 2v``, and what it would be if all frames had the same."""
    near = (torch.arange(FRAMES) - MIDDLE).abs() <= limit(speed)
    return (found.frame[near].sum() / found.frame.sum()).item(), near.float().mean().item()


def _plot(out: Path, found: dict[str, dict[float, Look]]) -> str:
    figure, axes = new_plot(11, 6.4, columns=len(SPEEDS), rows=2)
    dt = torch.arange(FRAMES) - MIDDLE
    for column, speed in enumerate(SPEEDS):
        full = found["full"][speed]
        axis, width = axes[0][column], SIZE[1] // PATCH
        edge = PATCH * (width // 2 + 0.5)
        top = full.map[dt != 0].max().item()
        box = (-edge, PATCH * width - edge, -MIDDLE - 0.5, MIDDLE + 0.5)
        axis.imshow(full.map.numpy(), origin="lower", aspect="auto", extent=box, cmap="Blues", vmin=0, vmax=top)
        axis.plot(speed * dt, dt, color=OFF, linewidth=1.5, label="x + v dt")
        axis.axvline(0, color="black", linewidth=1, linestyle="--", label="same position")
        axis.axhspan(-limit(speed), limit(speed), facecolor="none", edgecolor=GREY, linestyle=":")
        axis.set_title(f"v = {speed:g} pixels a frame", fontsize=10, loc="left")
        axis.set(xlabel="pixels from the object's token", xlim=box[:2], ylim=box[2:])
        below = axes[1][column]
        alike = 1 / (SIZE[0] // PATCH * width)
        below.plot(dt, full.line / full.frame, color=OFF, marker="o", markersize=4, label="on the line x + v dt")
        below.plot(dt, full.same / full.frame, color="black", linestyle="--", label="same position")
        below.axhline(alike, color=GREY, linewidth=0.8, label="any token alike")
        temporal = found["temporal"][speed].frame
        below.plot(
            dt, temporal, color=ON, linewidth=1, marker="s", markersize=3, label="temporal net: weight of the frame"
        )
        below.axvspan(-limit(speed), limit(speed), color=GREY, alpha=0.15)
        below.set(xlabel="dt, frames (grey: |dt| <= patch / 2v)", ylim=(0, None))
        below.grid(alpha=0.2)
    axes[0][0].set_ylabel("dt, frames")
    axes[1][0].set_ylabel("share of a frame's weight")
    axes[0][0].legend(fontsize=8, loc="upper left")
    axes[1][0].legend(fontsize=7, loc="upper right")
    return save_plot(figure, out / f"{NAME}.png")


def _table(out: Path, found: dict[str, dict[float, Look]], shares: dict[float, dict[str, float]]) -> str:
    text = (
        "Of the weight that the object's token in the middle frame puts on frames with |dt| > patch / 2v, the share of "
        "the token within half a patch of the line x + v dt, of the token at its own position, and of any token if all "
        "were alike; and the mean squared error of the denoised token (values in [-1, 1])."
    )
    header = ["v, pixels a frame", "patch / 2v", "line", "same position", "any", "error, full", "error, temporal"]
    rows: list[list[Any]] = []
    for speed in (0.0, *SPEEDS):
        errors = [f"{found[kind][speed].error:.4f}" for kind in ("full", "temporal")]
        if speed:
            s = shares[speed]
            rows.append([f"{speed:g}", limit(speed), s["line"], s["same"], s["alike"], *errors])
        else:
            rows.append(["0", "-", "-", "-", "-", *errors])
    return save_table(out / f"{NAME}.md", header, rows, text)


def _sheet(out: Path) -> str:
    velocity = torch.tensor(SPEEDS)
    video = make_clips(velocity, 2**31 + np.arange(len(SPEEDS)))[0].video
    shown = (noisy(video, seed=1)[1] + 1) / 2
    clips = [clip for pair in zip(video, shown) for clip in pair]
    labels = [f"v={v:g}{note}" for v in SPEEDS for note in ("", " noisy")]
    return contact_sheet(out / f"{NAME}_clips.png", clips, labels=labels, frames=FRAMES, scale=3).name
