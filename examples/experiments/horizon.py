"""Horizon: what comes back from behind an occluder, against how far back a temporal window lets a model look.

An object passes behind a wall and is out of sight for n frames. A causal net is given the clip up to the last of these
and predicts the next frame, in which the object returns. It was last seen n frames before. A layer with a
window of W past frames carries what it knows W frames on, L layers carry it ``L * W`` frames: so the object can return
in its own colour and row if ``n <= L * W``, and by luck alone otherwise. Spatial attention stays inside a frame and
adds no reach.
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
from experiments.net import MLP, VideoNet
from experiments.show import OFF, ON, THIRD, Track, new_plot, progress, save_plot, save_table
from vdcore.mask import FrameMask
from vdcore.video import Background, Layers, Scene, contact_sheet
from vdcore.video.scenes import uniform

NAME = "horizon"
NETS = ((1, 2), (1, 4), (1, 6), (2, 3), (3, 2))  # temporal layers, window in past frames
LONGEST = 8  # frames out of sight
FRAMES = LONGEST + 2  # given: the object is in the open in the first of them, whatever n is
SIZE = (12, 28)
PATCH = (4, 7)
SPEED = 2.0  # pixels a frame
COLOURS = ((0.9, 0.15, 0.15), (0.15, 0.8, 0.2), (0.2, 0.35, 0.95), (0.95, 0.85, 0.1))
ROWS = (1.5, 5.5, 9.5)
KINDS = len(COLOURS) * len(ROWS)
CHANCE = 1 / KINDS
SUCCESS = 0.9  # share of clips from which on a net is said to remember
ENOUGH = 0.97  # in a trial: training goes on below it


@dataclass(frozen=True)
class Budget:
    """How long each net is trained, and on how many clips of every n it is judged."""

    steps: int = 450
    more_steps: int = 500  # for every layer but the first: what is handed on takes longer to learn
    rounds: int = 3  # of so many steps at most, until clips of its own say that the net remembers as far as it reaches
    batch: int = 16
    lr: float = 3e-3
    clips: int = 192
    width: int = 64


def make_clips(hidden: Tensor, identity: Tensor, index: Sequence[int] | np.ndarray, *, last: bool = False) -> Scene:
    """Clips of ``FRAMES + 1`` frames in whose last frame an object returns after ``hidden`` frames out of sight.

    Args:
        hidden: ``(B,)``, n of each clip.
        identity: ``(B,)``, ``colour * len(ROWS) + row``.
        index: ``(B,)``, chooses the background.
        last: only the last frame.
    """
    n, kind = hidden.numpy().astype(np.float64), identity.numpy()
    B, H, T = len(n), SIZE[0], FRAMES + 1
    u = uniform(0, np.asarray(index), 10)
    wall_right = 3.5 + SPEED * FRAMES  # in its last frame the object has just come out; it is seen whole or not at all
    x = wall_right + SPEED * ((np.arange(T)[-1:] if last else np.arange(T)) - FRAMES + 0.5)
    T = len(x)
    y = np.array(ROWS)[kind % len(ROWS)]
    wall_left = wall_right - SPEED * n
    center = np.empty((B, 2, T, 2))
    center[:, 0, :, 0], center[:, 0, :, 1] = x, y[:, None]
    center[:, 1, :, 0], center[:, 1, :, 1] = ((wall_left + wall_right) / 2)[:, None], (H - 1) / 2
    half = np.empty((B, 2, 2))
    half[:, 0], half[:, 1, 0], half[:, 1, 1] = (SPEED / 2, 2.0), (wall_right - wall_left) / 2, H
    colour = np.empty((B, 2, 2, 3))
    colour[:, 0] = np.array(COLOURS)[kind // len(ROWS)][:, None]
    colour[:, 1] = np.array(((0.45,), (0.55,)))
    wave = np.full((B, 2, 2), 2 * np.pi / 6)
    layers = Layers(center, half, np.zeros((B, 2)), colour, wave, np.zeros((B, 2, 2)))
    heading, length = 2 * np.pi * u[:, :2], 8 + 16 * u[:, 2:4]
    wave = np.stack((np.cos(heading), np.sin(heading)), -1) * (2 * np.pi / length)[..., None]
    shades = 0.15 + 0.7 * u[:, 4:6, None] * np.ones(3)
    return Scene(Background(shades, wave, 2 * np.pi * u[:, 6:8]), layers, SIZE)


def new_net(layers: int, window: int, width: int) -> VideoNet:
    """Blocks of spatial attention, temporal attention to ``window`` past frames, and an MLP."""
    kinds, mask = ("spatial", "temporal"), FrameMask.window(window)
    return VideoNet((FRAMES, *SIZE), PATCH, width=width, blocks=layers, layers=kinds, mask=mask)


def predict(net: VideoNet, given: Tensor) -> Tensor:
    """What each frame of ``given`` ``(B, 3, T, H, W)`` is when the object returns: itself and what the net adds."""
    return given + net(2 * given - 1)


def train(net: VideoNet, budget: Budget, track: Track, label: str, done: int = 0) -> float:
    """Squared error of the frame of return, predicted from every frame in which the object is out of sight.

    Identity and background are drawn anew for every clip, and n, up to a limit that grows from 1 to ``LONGEST`` in the
    first third of a first round: otherwise a deep net of short windows sees little of what it can learn. Returns the
    last loss.

    Args:
        done: rounds before this one; every round draws other clips.
    """
    layers = sum(isinstance(block, MLP) for block in net.blocks)
    steps = budget.steps + budget.more_steps * (layers - 1)
    random = torch.Generator().manual_seed(done)
    optimizer = torch.optim.AdamW(net.parameters(), lr=budget.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 30, 4 - 4 * n / steps, 1))
    loss = torch.zeros(())
    for step in track(label, steps):
        longest = LONGEST if done else 1 + int((LONGEST - 1) * min(3 * step / steps, 1))
        hidden = torch.randint(1, longest + 1, (budget.batch,), generator=random)
        identity = torch.randint(KINDS, (budget.batch,), generator=random)
        index = torch.randint(2**31, (budget.batch,), generator=random)
        video = make_clips(hidden, identity, index.numpy()).video
        error = (predict(net, video[:, :, :-1]) - video[:, :, -1:]).square().mean((1, 3, 4))
        out_of_sight = torch.arange(FRAMES) >= FRAMES - hidden[:, None]
        loss = 100 * (error * out_of_sight).sum() / out_of_sight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()


def train_until(net: VideoNet, trials: Sequence[Exam], budget: Budget, track: Track, label: str) -> int:
    """Round after round until the net passes the trials; the rounds that took.

    Args:
        trials: of every n that the net reaches, by clips that neither training nor the experiment shows.
    """
    for done in range(budget.rounds):
        again = f", round {done + 1}" if done else ""
        net.train()
        train(net, budget, track, label + again, done)
        net.eval()
        if min(trial.success(net) for trial in trials) > ENOUGH:
            return done + 1
    return budget.rounds


@dataclass(frozen=True)
class Exam:
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
    def of(cls, hidden: int, clips: int, *, trial: bool = False) -> Exam:
        identity = torch.arange(clips) % KINDS
        index = 2**31 + 10**6 * trial + 10000 * hidden + np.arange(clips)  # training draws below 2**31
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


def run(out: Path, budget: Budget = Budget(), nets: Sequence[tuple[int, int]] = NETS) -> Figure:
    """Trains every net, judges it for n = 1 to ``LONGEST``, and writes curves, a table and the figure into ``out``."""
    started = time.monotonic()
    curves: dict[tuple[int, int], list[float]] = {}
    rounds: dict[tuple[int, int], int] = {}
    leak, reached, shown = 0.0, [], []
    exams, trials = ([Exam.of(n, budget.clips, trial=trial) for n in range(1, LONGEST + 1)] for trial in (False, True))
    with progress(NAME) as track:
        for layers, window in nets:
            torch.manual_seed(0)
            net = new_net(layers, window, budget.width)
            label, reach = f"{_layers(layers)}, window {window}", min(layers * window, LONGEST)
            rounds[layers, window] = train_until(net, trials[:reach], budget, track, label)
            curves[layers, window] = [exam.success(net) for exam in exams]
            effects = [influence(net, n) for n in range(1, LONGEST + 1)]
            leak = max([leak, *effects[reach:]])
            reached += effects[:reach]
            shown.append(_continued(net, reach))
    files = [_plot(out, curves), _table(out, curves, rounds, budget), _sheet(out, curves, shown)]
    return _figure(curves, rounds, leak, reached, budget, time.monotonic() - started, files, out)


def _figure(
    curves: dict[tuple[int, int], list[float]],
    rounds: dict[tuple[int, int], int],
    leak: float,
    reached: list[float],
    budget: Budget,
    seconds: float,
    files: list[str],
    out: Path,
) -> Figure:
    inside = [p for (L, W), curve in curves.items() for p in curve[: L * W]]
    beyond = [p for (L, W), curve in curves.items() for p in curve[L * W :]]
    luck = CHANCE + 4 * (CHANCE * (1 - CHANCE) / budget.clips) ** 0.5
    numbers: dict[str, Any] = {
        "least_success_within_reach": min(inside),
        "mean_success_within_reach": sum(inside) / len(inside),
        "most_success_beyond_reach": max(beyond, default=0.0),
        "mean_success_beyond_reach": sum(beyond) / max(len(beyond), 1),
        "largest_derivative_beyond_reach": leak,
        "least_derivative_within_reach": min(reached),
        "success": {f"layers={L}, window={W}": curve for (L, W), curve in curves.items()},
        "rounds": {f"layers={L}, window={W}": n for (L, W), n in rounds.items()},
    }
    passed = min(inside) >= SUCCESS and max(beyond, default=0.0) <= luck and leak == 0 and min(reached) > 0
    figure = Figure(
        name=NAME,
        claim="An object returns from an occlusion of n frames as what it was where n <= layers x window, "
        "and by luck alone where n is longer.",
        numbers=numbers,
        compared_with={"success_counts_from": SUCCESS, "chance": CHANCE, "chance_plus_4_sigma": luck},
        passed=passed,
        size=_size(budget, seconds, len(curves)),
        files=files,
    )
    figure.save(out)
    return figure


def _size(budget: Budget, seconds: float, nets: int) -> str:
    return (
        f"toy world: {SIZE[0]}x{SIZE[1]} pixels, {FRAMES} frames given, one box of 4x2 pixels, "
        f"{len(COLOURS)} colours x {len(ROWS)} rows; {nets} nets of width {budget.width}, "
        f"{budget.steps} steps of {budget.batch} clips and {budget.more_steps} more for every layer but the first, "
        f"again, in {budget.rounds} rounds at most, until it remembers {ENOUGH:.0%} of other clips; "
        f"{budget.clips} clips for every n; {seconds:.0f} s in all"
    )


def _layers(number: int) -> str:
    return "1 layer" if number == 1 else f"{number} layers"


def _plot(out: Path, curves: dict[tuple[int, int], list[float]]) -> str:
    figure, axes = new_plot(10, 3.8, columns=2)
    n, reach = range(1, LONGEST + 1), max(L * W for L, W in curves)
    groups = (
        ("One temporal layer: the window is the reach", [(L, W) for L, W in curves if L == 1]),
        (f"Layers x window = {reach}", [(L, W) for L, W in curves if reach == L * W]),
    )
    for axis, (title, nets) in zip(axes[0], groups):
        for (L, W), colour, marker, size in zip(nets, (ON, OFF, THIRD), "os^", (9, 6, 4)):
            axis.plot(n, curves[L, W], label=f"{_layers(L)}, window {W}", color=colour, marker=marker, markersize=size)
            axis.axvline(L * W + 0.5, color=colour, linewidth=0.8, linestyle=":")
        axis.axhline(CHANCE, color="black", linewidth=0.8, linestyle="--")
        axis.text(1, CHANCE + 0.02, "chance", fontsize=8)
        axis.set(xlabel="frames out of sight, n", ylim=(0, 1.04), xticks=list(n))
        axis.set_title(f"{title} (dotted)", fontsize=10, loc="left")
        axis.legend(fontsize=8, loc="center left")
        axis.grid(alpha=0.2)
    axes[0][0].set_ylabel("returns in its own colour and row")
    return save_plot(figure, out / f"{NAME}.png")


def _table(
    out: Path, curves: dict[tuple[int, int], list[float]], rounds: dict[tuple[int, int], int], budget: Budget
) -> str:
    text = (
        "Share of clips in which the object returns in its own colour and row, by the number n of frames that it was"
        f" out of sight ({budget.clips} clips each; chance {CHANCE:.3f}; from {SUCCESS} on a net is said to remember)."
    )
    header = ["temporal layers", "window", "reach", "rounds", *(f"n={n}" for n in range(1, LONGEST + 1))]
    rows = [(L, W, L * W, rounds[L, W], *(f"{p:.2f}" for p in curve)) for (L, W), curve in curves.items()]
    return save_table(out / f"{NAME}.md", header, rows, text)


@torch.no_grad()
def _continued(net: VideoNet, hidden: int) -> Tensor:
    """One clip, true to its last hidden frame, and the predicted frame of return."""
    video = make_clips(torch.tensor([hidden]), torch.tensor([hidden % 12]), [123 + hidden]).video
    return torch.cat((video[0, :, :-1], predict(net, video[:, :, :-1])[0, :, -1:]), 1)


def _sheet(out: Path, curves: dict[tuple[int, int], list[float]], shown: list[Tensor]) -> str:
    labels = [f"{_layers(L)} x {W}, n={min(L * W, LONGEST)}" for L, W in curves]
    return contact_sheet(out / f"{NAME}_frames.png", shown, labels=labels, frames=FRAMES + 1, scale=3).name
