"""Horizon: what comes back from behind an occluder, against how far back a temporal window lets a model look.

An object passes behind a wall and is out of sight for n frames. A causal net is given the clip up to the last of these
and predicts the next frame, in which the object returns. It was last seen n frames before. A layer with a
window of W past frames carries what it knows W frames on, L layers carry it ``L * W`` frames: so the object can return
in its own color and row if ``n <= L * W``, and by luck alone otherwise. Spatial attention stays inside a frame and
adds no reach.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.fit import fit
from experiments.net import MLP, VideoNet
from experiments.show import OFF, ON, THIRD, Track, new_plot, progress, save_plot
from vdcore.mask import FrameMask
from vdcore.video import Background, Layers, Scene, contact_sheet
from vdcore.video.scenes import uniform, waves
from vdcore_bench.report.table import Table

NAME = "horizon"
NETS = ((1, 2), (1, 4), (1, 6), (2, 3), (3, 2))  # temporal layers, window in past frames
LONGEST = 8  # frames out of sight
FRAMES = LONGEST + 2  # given: the object is in the open in the first of them, whatever n is
SIZE = (12, 28)
PATCH = (4, 7)
SPEED = 2.0  # pixels per frame
COLORS = ((0.9, 0.15, 0.15), (0.15, 0.8, 0.2), (0.2, 0.35, 0.95), (0.95, 0.85, 0.1))
ROWS = (1.5, 5.5, 9.5)
KINDS = len(COLORS) * len(ROWS)
CHANCE = 1 / KINDS
SUCCESS = 0.9  # share of clips from which on a net is said to remember
ENOUGH = 0.97  # in validation: training goes on below it


@dataclass(frozen=True)
class TrainConfig:
    """How long each net is trained, and the number of clips per n that it is judged on."""

    steps: int = 450
    more_steps: int = 500  # for every layer but the first: what is handed on takes longer to learn
    rounds: int = 3  # of so many steps at most, until validation says that the net remembers as far as it reaches
    batch: int = 16
    lr: float = 3e-3
    clips: int = 192
    width: int = 64


def make_clips(hidden: Tensor, identity: Tensor, index: Sequence[int] | np.ndarray, *, last: bool = False) -> Scene:
    """Clips of ``FRAMES + 1`` frames in whose last frame an object returns after ``hidden`` frames out of sight.

    Args:
        hidden: ``(B,)``, n of each clip.
        identity: ``(B,)``, ``color * len(ROWS) + row``.
        index: ``(B,)``, chooses the background.
        last: only the last frame.
    """
    n, kind = hidden.numpy().astype(np.float64), identity.numpy()
    B, H = len(n), SIZE[0]
    frames = np.arange(FRAMES, FRAMES + 1) if last else np.arange(FRAMES + 1)
    u = uniform(0, np.asarray(index), 10)
    right = 3.5 + SPEED * FRAMES  # of the wall: in its last frame the object has just come out, whole
    left = right - SPEED * n
    center = np.empty((B, 2, len(frames), 2))
    center[:, 0, :, 0] = right + SPEED * (frames - FRAMES + 0.5)
    center[:, 0, :, 1] = np.array(ROWS)[kind % len(ROWS), None]
    center[:, 1, :, 0], center[:, 1, :, 1] = ((left + right) / 2)[:, None], (H - 1) / 2
    half = np.empty((B, 2, 2))
    half[:, 0], half[:, 1, 0], half[:, 1, 1] = (SPEED / 2, 2.0), (right - left) / 2, H
    color = np.empty((B, 2, 2, 3))
    color[:, 0] = np.array(COLORS)[kind // len(ROWS)][:, None]
    color[:, 1] = np.array(((0.45,), (0.55,)))
    layers = Layers(center, half, np.zeros((B, 2)), color, np.full((B, 2, 2), 2 * np.pi / 6), np.zeros((B, 2, 2)))
    shades = 0.15 + 0.7 * u[:, 4:6, None] * np.ones(3)
    background = Background(shades, waves(2 * np.pi * u[:, :2], 8 + 16 * u[:, 2:4]), 2 * np.pi * u[:, 6:8])
    return Scene(background, layers, SIZE)


def new_net(layers: int, window: int, width: int) -> VideoNet:
    """Blocks of spatial attention, temporal attention to ``window`` past frames, and an MLP."""
    kinds, mask = ("spatial", "temporal"), FrameMask.window(window)
    return VideoNet((FRAMES, *SIZE), PATCH, width=width, blocks=layers, layers=kinds, mask=mask)


def predict(net: VideoNet, given: Tensor) -> Tensor:
    """What each frame of ``given`` ``(B, 3, T, H, W)`` is when the object returns: itself and what the net adds."""
    return given + net(2 * given - 1)


def train(net: VideoNet, config: TrainConfig, track: Track, label: str, done: int = 0) -> list[float]:
    """Squared error of the frame of return, predicted from every frame in which the object is out of sight.

    Identity and background are drawn anew for every clip, and n, up to a limit that grows from 1 to ``LONGEST`` in the
    first third of a first round: otherwise a deep net of short windows sees little of what it can learn.

    Args:
        done: rounds before this one; every round draws other clips.
    """
    layers = sum(isinstance(block, MLP) for block in net.blocks)
    steps = config.steps + config.more_steps * (layers - 1)

    def loss(step: int, random: torch.Generator) -> Tensor:
        longest = LONGEST if done else 1 + int((LONGEST - 1) * min(3 * step / steps, 1))
        hidden = torch.randint(1, longest + 1, (config.batch,), generator=random)
        identity = torch.randint(KINDS, (config.batch,), generator=random)
        index = torch.randint(2**31, (config.batch,), generator=random)
        video = make_clips(hidden, identity, index.numpy()).video
        error = (predict(net, video[:, :, :-1]) - video[:, :, -1:]).square().mean((1, 3, 4))
        out_of_sight = torch.arange(FRAMES) >= FRAMES - hidden[:, None]
        return 100 * (error * out_of_sight).sum() / out_of_sight.sum()

    return fit(net, loss, track(label, steps), steps=steps, lr=config.lr, seed=done)


def train_until(net: VideoNet, validation: Sequence[EvalSet], config: TrainConfig, track: Track, label: str) -> int:
    """Round after round until the net succeeds in validation, of every n that it reaches; returns their number."""
    for done in range(config.rounds):
        train(net, config, track, label + (f", round {done + 1}" if done else ""), done)
        if min(clips.success(net) for clips in validation) > ENOUGH:
            return done + 1
    return config.rounds


@dataclass(frozen=True)
class EvalSet:
    """Clips of one n, and what every identity would look like as it returns.

    Args:
        given: ``(B, 3, T, H, W)``.
        identity: ``(B,)``, the true one.
        candidates: ``(kinds, B, 3, H, W)``.
    """

    given: Tensor
    identity: Tensor
    candidates: Tensor

    @classmethod
    def of(cls, hidden: int, clips: int, *, validation: bool = False) -> EvalSet:
        """Clips that training never shows; those for validation are others again."""
        identity = torch.arange(clips) % KINDS
        index = 2**31 + 10**6 * validation + 10000 * hidden + np.arange(clips)  # training draws below 2**31
        n = torch.full_like(identity, hidden)
        given = make_clips(n, identity, index).video[:, :, :-1]
        returns = [make_clips(n, torch.full_like(n, kind), index, last=True).video[:, :, 0] for kind in range(KINDS)]
        return cls(given, identity, torch.stack(returns))

    @torch.no_grad()
    def success(self, net: VideoNet) -> float:
        """Share of clips whose predicted frame is nearest, of all identities, to the true one's."""
        found = predict(net, self.given)[:, :, -1]
        errors = (found - self.candidates).square().flatten(2).sum(2)
        return (errors.argmin(0) == self.identity).float().mean().item()


def influence(net: VideoNet, hidden: int) -> float:
    """Largest derivative of the prediction by any pixel of a frame that shows the object; 0 is exact."""
    given = make_clips(torch.tensor([hidden]), torch.tensor([0]), [7]).video[:, :, :-1].requires_grad_()
    (gradient,) = torch.autograd.grad(net(2 * given - 1)[:, :, -1].square().sum(), given)
    return gradient[:, :, : FRAMES - hidden].abs().max().item()


@dataclass(frozen=True)
class Result:
    """What was found of a net: the share of successes by n, the derivatives by n, rounds of training, and a clip.

    The clip is true to its last hidden frame; the frame of return is predicted.
    """

    layers: int
    window: int
    success: list[float]
    effects: list[float]
    rounds: int
    clip: Tensor

    @property
    def reach(self) -> int:
        return min(self.layers * self.window, LONGEST)

    @property
    def label(self) -> str:
        return f"{self.layers} layer{'s' * (self.layers > 1)}, window {self.window}"


def run(out: Path, config: TrainConfig = TrainConfig(), nets: Sequence[tuple[int, int]] = NETS) -> Figure:
    """Trains every net, judges it for n = 1 to ``LONGEST``, and writes curves, a table and the figure into ``out``."""
    started = time.monotonic()
    lengths = range(1, LONGEST + 1)
    test, validation = ([EvalSet.of(n, config.clips, validation=v) for n in lengths] for v in (False, True))
    results = []
    with progress(NAME) as track:
        for layers, window in nets:
            torch.manual_seed(0)
            net, reach = new_net(layers, window, config.width), min(layers * window, LONGEST)
            label = f"layers {layers}, window {window}"
            rounds = train_until(net, validation[:reach], config, track, label)
            video = make_clips(torch.tensor([reach]), torch.tensor([reach % KINDS]), [123 + reach]).video
            with torch.no_grad():
                clip = torch.cat((video[0, :, :-1], predict(net, video[:, :, :-1])[0, :, -1:]), 1)
            success, effects = [clips.success(net) for clips in test], [influence(net, n) for n in lengths]
            results.append(Result(layers, window, success, effects, rounds, clip))
    inside = [p for r in results for p in r.success[: r.reach]]
    beyond = [p for r in results for p in r.success[r.reach :]]
    leak = max([0.0, *(x for r in results for x in r.effects[r.reach :])])
    reached = min(x for r in results for x in r.effects[: r.reach])
    luck = CHANCE + 4 * (CHANCE * (1 - CHANCE) / config.clips) ** 0.5
    names = [f"layers={r.layers}, window={r.window}" for r in results]
    return Figure(
        name=NAME,
        claim="An object returns from an occlusion of n frames as what it was where n <= layers x window, "
        "and by luck alone where n is longer.",
        numbers={
            "least_success_within_reach": min(inside),
            "mean_success_within_reach": sum(inside) / len(inside),
            "most_success_beyond_reach": max(beyond, default=0.0),
            "mean_success_beyond_reach": sum(beyond) / max(len(beyond), 1),
            "largest_derivative_beyond_reach": leak,
            "least_derivative_within_reach": reached,
            "success": {name: r.success for name, r in zip(names, results)},
            "rounds": {name: r.rounds for name, r in zip(names, results)},
        },
        compared_with={"success_counts_from": SUCCESS, "chance": CHANCE, "chance_plus_4_sigma": luck},
        passed=min(inside) >= SUCCESS and max(beyond, default=0.0) <= luck and leak == 0 and reached > 0,
        size=f"toy world: {SIZE[0]}x{SIZE[1]} pixels, {FRAMES} frames given, one box of 4x2 pixels, "
        f"{len(COLORS)} colors x {len(ROWS)} rows; {len(results)} nets of width {config.width}, "
        f"{config.steps} steps of {config.batch} clips and {config.more_steps} more for every layer but the first, "
        f"again, in {config.rounds} rounds at most, until it remembers {ENOUGH:.0%} of other clips; "
        f"{config.clips} clips for every n; {time.monotonic() - started:.0f} s in all",
        files=[_plot(out, results), _sheet(out, results)],
        table=_table(results, config.clips),
        captions={
            f"{NAME}.png": "Share of clips in which the object returns in its own color and row. Each curve should "
            "fall from 1 to chance at its dotted line, the reach of that net.",
            f"{NAME}_frames.png": "A clip in each row, hidden for as long as the net reaches. All frames but the last "
            "are given; the last is the net's prediction.",
        },
    ).save(out)


def _table(results: Sequence[Result], clips: int) -> Table:
    text = (
        "Share of clips in which the object returns in its own color and row, by the number n of frames that it was"
        f" out of sight ({clips} clips each; chance {CHANCE:.3f}; from {SUCCESS} on a net is said to remember)."
    )
    header = ["temporal layers", "window", "reach", "rounds", *(f"n={n}" for n in range(1, LONGEST + 1))]
    rows = [(r.layers, r.window, r.layers * r.window, r.rounds, *(f"{p:.2f}" for p in r.success)) for r in results]
    return Table.of(header, rows, note=text)


def _sheet(out: Path, results: Sequence[Result]) -> str:
    labels, clips = [f"{r.label}, n={r.reach}" for r in results], [r.clip for r in results]
    return contact_sheet(out / f"{NAME}_frames.png", clips, labels=labels, frames=FRAMES + 1, scale=3).name


def _plot(out: Path, results: Sequence[Result]) -> str:
    figure, axes = new_plot(10, 3.8, columns=2)
    reach = max(r.layers * r.window for r in results)
    _curves(axes[0][0], "One temporal layer: the window is the reach", (r for r in results if r.layers == 1))
    _curves(axes[0][1], f"Layers x window = {reach}", (r for r in results if reach == r.layers * r.window))
    axes[0][0].set_ylabel("returns in its own color and row")
    return save_plot(figure, out / f"{NAME}.png")


def _curves(axis: Any, title: str, results: Iterable[Result]) -> None:
    for r, color, marker, size in zip(results, (ON, OFF, THIRD), "os^", (9, 6, 4)):
        axis.plot(range(1, LONGEST + 1), r.success, label=r.label, color=color, marker=marker, markersize=size)
        axis.axvline(r.layers * r.window + 0.5, color=color, linewidth=0.8, linestyle=":")
    axis.axhline(CHANCE, color="black", linewidth=0.8, linestyle="--")
    axis.text(1, CHANCE + 0.02, "chance", fontsize=8)
    axis.set(xlabel="frames out of sight, n", ylim=(0, 1.04), xticks=list(range(1, LONGEST + 1)))
    axis.set_title(f"{title} (dotted)", fontsize=10, loc="left")
    axis.legend(fontsize=8, loc="center left")
    axis.grid(alpha=0.2)
