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

import numpy as np
import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.fit import fit
from experiments.net import Attention, VideoNet
from experiments.show import GRAY, OFF, ON, Track, new_plot, progress, save_plot
from vdcore.video import Background, Layers, Scene, contact_sheet
from vdcore.video.scenes import uniform, waves
from vdcore_bench.report.table import Table

NAME = "motion_paths"
FRAMES, SIZE, PATCH = 9, (12, 32), 4  # frames; pixels; a patch is PATCH x PATCH of one frame
MIDDLE = FRAMES // 2
DT = torch.arange(FRAMES) - MIDDLE
ALIKE = 1 / (SIZE[0] // PATCH * SIZE[1] // PATCH)  # a token's share of its frame if all were alike
SPEEDS = (1.0, 2.0, 3.0)  # pixels per frame, to either side; trained between 0 and the last
NOISE = 0.5  # standard deviation, of values in [-1, 1]
TIMES_SAME, TIMES_ANY = 2.0, 5.0  # least weight of the line over the same position, and over the average token


@dataclass(frozen=True)
class TrainConfig:
    """How long each net is trained, and the number of clips per speed that it is measured on."""

    steps: int = 800
    batch: int = 8
    lr: float = 3e-3
    width: int = 64
    clips: int = 96


def make_clips(velocity: Tensor, index: Sequence[int] | np.ndarray) -> tuple[Scene, Tensor]:
    """A square as large as a patch at each velocity ``(B,)``, and the token ``(B,)`` that it fills in the middle frame.

    So half a patch is what it can move before it is nearer to another token. Colors, texture, row and background are
    drawn from ``index``.
    """
    v = velocity.double().numpy()
    B, (H, W) = len(v), SIZE
    u = uniform(0, np.asarray(index), 16)
    rows, columns = H // PATCH, W // PATCH
    column, row = columns // 2 - (u[:, 0] < 0.5), np.floor(u[:, 1] * rows)
    center = np.empty((B, FRAMES, 2))
    center[..., 0] = (PATCH * column + (PATCH - 1) / 2)[:, None] + v[:, None] * DT.numpy()
    center[..., 1] = (PATCH * row + (PATCH - 1) / 2)[:, None]
    layers = Layers(
        center=center[:, None],
        half=np.full((B, 1, 2), PATCH / 2),
        corner=np.zeros((B, 1)),
        color=u[:, 2:8].reshape(B, 1, 2, 3),
        wave=(2 * np.pi / (4 + 4 * u[:, 8:10])).reshape(B, 1, 2),
        phase=2 * np.pi * u[:, 10:12].reshape(B, 1, 2),
    )
    shade = np.broadcast_to(0.3 + 0.4 * u[:, 12:14, None], (B, 2, 3))
    background = Background(shade, waves(2 * np.pi * u[:, 14:15], np.full((B, 1), 24.0)), 2 * np.pi * u[:, 15:16])
    return Scene(background, layers, SIZE), torch.from_numpy(row * columns + column).long()


def new_net(kind: str, width: int) -> VideoNet:
    """Two blocks of full 3D attention, or of temporal attention at one position, each with its MLP."""
    return VideoNet((FRAMES, *SIZE), (PATCH, PATCH), width=width, blocks=2, layers=(kind,))


def noisy(video: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The clip in [-1, 1], and with noise."""
    clean = 2 * video - 1
    return clean, clean + NOISE * torch.randn(clean.shape, generator=random)


def train(net: VideoNet, config: TrainConfig, track: Track, label: str) -> None:
    """Squared error of the clean clip; the velocity is uniform between the highest speeds to either side."""

    def loss(step: int, random: torch.Generator) -> Tensor:
        velocity = SPEEDS[-1] * (2 * torch.rand(config.batch, generator=random) - 1)
        index = torch.randint(2**31, (config.batch,), generator=random)
        clean, given = noisy(make_clips(velocity, index.numpy())[0].video, random)
        return (net(given) - clean).square().mean()

    fit(net, loss, track(label, config.steps), steps=config.steps, lr=config.lr)


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

    def far_shares(self, speed: float) -> tuple[float, float]:
        """Of the weight on frames with ``|dt| > patch / 2v``: the shares of the line and of the same position."""
        far = DT.abs() > limit(speed)
        line, same, total = (x[far].sum() for x in (self.line, self.same, self.frame))
        return (line / total).item(), (same / total).item()

    def near_share(self, speed: float) -> float:
        """The share of the weight that is on frames with ``|dt| <= patch / 2v``."""
        return (self.frame[DT.abs() <= limit(speed)].sum() / self.frame.sum()).item()


@torch.no_grad()
def look(net: VideoNet, speed: float, clips: int) -> Look:
    """Weights of the last attention layer, mean over heads and clips, from the object's token in the middle frame."""
    scene, token = make_clips(torch.full((clips,), speed), 2**31 + np.arange(clips))
    clean, given = noisy(scene.video, torch.Generator().manual_seed(1))
    *before, layer, _ = net.blocks
    assert isinstance(layer, Attention)
    x = net.tokens(given)
    for block in before:
        x = block(x)
    rows, columns = net.grid[1:]
    weights = layer.weights(x, MIDDLE, token).mean(1).unflatten(-1, (rows, columns))  # (B, T, rows, columns)
    row, column = token // columns, token % columns
    weights_in_row = weights[torch.arange(clips), :, row]  # (B, T, columns)
    shifts = (columns // 2 - column).tolist()
    aligned = torch.stack([w.roll(s, -1) for w, s in zip(weights_in_row, shifts)]).mean(0)
    away = torch.floor((speed * DT + PATCH / 2) / PATCH).long()  # columns from the query to the token on the line
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


def run(out: Path, config: TrainConfig = TrainConfig()) -> Figure:
    """Trains both nets, measures where they look, and writes maps, a table and the figure into ``out``."""
    started = time.monotonic()
    found: dict[str, dict[float, Look]] = {}
    with progress(NAME) as track:
        for kind, label in (("full", "full 3D attention"), ("temporal", "temporal attention")):
            torch.manual_seed(0)
            net = new_net(kind, config.width)
            train(net, config, track, label)
            found[kind] = {speed: look(net, speed, config.clips) for speed in (0.0, *SPEEDS)}
    full, temporal = found["full"], found["temporal"]
    lines, sames = zip(*(full[v].far_shares(v) for v in SPEEDS))
    near = [temporal[v].near_share(v) for v in SPEEDS]
    near_if_alike = [(DT.abs() <= limit(v)).float().mean().item() for v in SPEEDS]

    def by_speed(values: Sequence[float], speeds: Sequence[float] = SPEEDS) -> dict[str, float]:
        return {f"v={v:g}": value for v, value in zip(speeds, values)}

    return Figure(
        name=NAME,
        claim="Full 3D attention learns to look along the slanted line x + v dt: beyond |dt| = patch / 2v, where "
        "attention at one position has lost the object, the token on the line outweighs the one at the same position "
        f"{TIMES_SAME:g} times at least and the average token {TIMES_ANY:g} times, at every speed; and temporal "
        "attention puts more on the frames within that limit than all frames alike would have.",
        numbers={
            "share_of_the_line": by_speed(lines),
            "share_of_the_same_position": by_speed(sames),
            "error_of_temporal_over_full": by_speed([temporal[v].error / full[v].error for v in full], list(full)),
            "temporal_attention_within_the_limit": by_speed(near),
        },
        compared_with={
            "share_of_any_token": ALIKE,
            "times_same_position": TIMES_SAME,
            "times_any_token": TIMES_ANY,
            "limit_in_frames": by_speed([limit(v) for v in SPEEDS]),
            "temporal_attention_within_the_limit_if_alike": by_speed(near_if_alike),
        },
        passed=all(line >= max(TIMES_SAME * same, TIMES_ANY * ALIKE) for line, same in zip(lines, sames))
        and all(share > alike for share, alike in zip(near, near_if_alike)),
        size=f"toy world: {SIZE[0]}x{SIZE[1]} pixels, {FRAMES} frames, patches of {PATCH}x{PATCH}, a square of one, "
        f"noise of {NOISE:g}; nets of two layers of width {config.width}, {config.steps} steps of {config.batch} "
        f"clips; {config.clips} clips of each speed; {time.monotonic() - started:.0f} s in all",
        files=[_plot(out, full, temporal), _sheet(out)],
        table=_table(full, temporal),
        captions={
            f"{NAME}.png": "Above: how much the object's token in the middle frame looks at each frame and column; "
            "the dark cells should follow the slanted line. Below: the same along the line and at the same position.",
            f"{NAME}_clips.png": "Clips of each speed, clean and as the nets are given them.",
        },
    ).save(out)


def _plot(out: Path, full: dict[float, Look], temporal: dict[float, Look]) -> str:
    figure, axes = new_plot(11, 6.4, columns=len(SPEEDS), rows=2)
    width = SIZE[1] // PATCH
    edge = PATCH * (width // 2 + 0.5)
    box = (-edge, PATCH * width - edge, -MIDDLE - 0.5, MIDDLE + 0.5)
    for speed, axis, below in zip(SPEEDS, *axes):
        found, top = full[speed], full[speed].map[DT != 0].max().item()
        axis.imshow(found.map.numpy(), origin="lower", aspect="auto", extent=box, cmap="Blues", vmin=0, vmax=top)
        axis.plot(speed * DT, DT, color=OFF, linewidth=1.5, label="x + v dt")
        axis.axvline(0, color="black", linewidth=1, linestyle="--", label="same position")
        axis.axhspan(-limit(speed), limit(speed), facecolor="none", edgecolor=GRAY, linestyle=":")
        axis.set_title(f"v = {speed:g} pixels per frame", fontsize=10, loc="left")
        axis.set(xlabel="pixels from the object's token", xlim=box[:2], ylim=box[2:])
        below.plot(DT, found.line / found.frame, color=OFF, marker="o", markersize=4, label="on the line x + v dt")
        below.plot(DT, found.same / found.frame, color="black", linestyle="--", label="same position")
        below.axhline(ALIKE, color=GRAY, linewidth=0.8, label="any token alike")
        label = "temporal net: weight of the frame"
        below.plot(DT, temporal[speed].frame, color=ON, linewidth=1, marker="s", markersize=3, label=label)
        below.axvspan(-limit(speed), limit(speed), color=GRAY, alpha=0.15)
        below.set(xlabel="dt, frames (gray: |dt| <= patch / 2v)", ylim=(0, None))
        below.grid(alpha=0.2)
    axes[0][0].set_ylabel("dt, frames")
    axes[1][0].set_ylabel("share of a frame's weight")
    axes[0][0].legend(fontsize=8, loc="upper left")
    axes[1][0].legend(fontsize=7, loc="upper right")
    return save_plot(figure, out / f"{NAME}.png")


def _table(full: dict[float, Look], temporal: dict[float, Look]) -> Table:
    text = (
        "Of the weight that the object's token in the middle frame puts on frames with |dt| > patch / 2v, the share of "
        "the token within half a patch of the line x + v dt, of the token at its own position, and of any token if all "
        "were alike; and the mean squared error of the denoised token (values in [-1, 1])."
    )
    header = ["v, pixels per frame", "patch / 2v", "line", "same position", "any", "error, full", "error, temporal"]
    rows = []
    for v in full:
        shares = (limit(v), *full[v].far_shares(v), ALIKE) if v else ("-",) * 4
        rows.append((f"{v:g}", *shares, f"{full[v].error:.4f}", f"{temporal[v].error:.4f}"))
    return Table.of(header, rows, note=text)


def _sheet(out: Path) -> str:
    video = make_clips(torch.tensor(SPEEDS), 2**31 + np.arange(len(SPEEDS)))[0].video
    shown = (noisy(video, torch.Generator().manual_seed(1))[1] + 1) / 2
    clips = [clip for pair in zip(video, shown) for clip in pair]
    labels = [f"v={v:g}{note}" for v in SPEEDS for note in ("", " noisy")]
    return contact_sheet(out / f"{NAME}_clips.png", clips, labels=labels, frames=FRAMES, scale=3).name
