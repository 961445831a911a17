"""Causal encoder: a clip coded in chunks is the clip coded whole, without a seam; one that looks ahead leaves seams.

An autoencoder turns clips into latents that are 4 times shorter. Its convolutions over time see the past alone, so a
clip may be coded in chunks as it arrives, and the result must be that of coding it whole. Beside it the same
autoencoder whose convolutions also see the next frames: coded in chunks, those are missing at every border.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.fit import fit
from experiments.show import draw_curves, new_plot, progress, save_plot
from vdcore.diffusion.training import SCENES
from vdcore.models.autoencoder import AutoencoderConfig, CausalAutoencoder
from vdcore.testing import error_ratio
from vdcore.video import contact_sheet
from vdcore_bench.report.table import Table

NAME = "causal_encoder"
SEAM = 100.0  # least ratio of the other form's seam to the causal form's error


@dataclass(frozen=True)
class Settings:
    """Sizes: of the autoencoder, its training, and the clip that is coded."""

    widths: tuple[int, ...] = (16, 32, 48)
    steps: int = 150
    batch: int = 2
    frames: int = 33
    chunk: int = 4
    lr: float = 3e-3


def run(out: Path, settings: Settings = Settings()) -> Figure:
    """Trains a small autoencoder, codes a clip whole and in chunks in both forms, writes plots and the figure."""
    started = time.monotonic()
    causal = CausalAutoencoder(AutoencoderConfig(widths=settings.widths))
    ahead = CausalAutoencoder(AutoencoderConfig(widths=settings.widths, causal=False))
    models = {"causal": causal, "looking ahead": ahead}
    with progress(NAME) as track:
        for label, model in models.items():
            _train(model, settings, track(label, settings.steps))
    long = replace(SCENES, frames=settings.frames, speed=(0.3, 0.8))
    clip = long.batch(1, torch.Generator().manual_seed(9)).video * 2 - 1
    with torch.no_grad():
        results = {name: (m.encode(clip), m.encode(clip, chunk=settings.chunk)) for name, m in models.items()}
        double = CausalAutoencoder(causal.config).double()
        double.load_state_dict(causal.state_dict())
        exact = double.encode(clip.double())
        back = causal(clip)
        decoded = causal.decode(results["causal"][1], chunk=1)
        ratio = max(
            error_ratio(results["causal"][1], exact, [results["causal"][0]]).worst,
            error_ratio(decoded, double.decode(exact), [back]).worst,
        )
    # Largest difference per latent frame.
    gaps = {name: (whole - chunks).abs().amax((0, 1, 3, 4)) for name, (whole, chunks) in results.items()}
    largest = {name: gap.max().item() for name, gap in gaps.items()}
    plot, axes = new_plot(7, 3.6)
    curves = {name: gap.clamp(min=1e-9).tolist() for name, gap in gaps.items()}
    labels = {"xlabel": "latent frame", "ylabel": "|in chunks - whole|, largest", "yscale": "log"}
    draw_curves(axes[0][0], range(exact.shape[2]), curves, marker="o", **labels)
    shown = [((x[0] + 1) / 2).clamp(0, 1) for x in (clip, back)]
    return Figure(
        name=NAME,
        claim=f"Coding a clip in chunks of {settings.chunk} frames equals coding it whole within the tolerance rule, "
        f"there and back; the form that looks ahead is off by at least {SEAM:.0f} times as much.",
        numbers={
            "error_ratio": ratio,
            "largest_difference": largest["causal"],
            "psnr_db": 10 * torch.log10(4 / (back - clip).square().mean()).item(),
        },
        compared_with={
            "error_ratio_allowed": 1.0,
            "largest_difference_looking_ahead": largest["looking ahead"],
            "largest_latent": exact.abs().max().item(),
        },
        passed=ratio <= 1 and largest["looking ahead"] >= SEAM * max(largest["causal"], 1e-9),
        size=f"channels {settings.widths}, {settings.steps} steps of {settings.batch} clips of 9 frames of "
        f"{SCENES.size[0]}x{SCENES.size[1]} pixels each; a clip of {settings.frames} frames; "
        f"{time.monotonic() - started:.0f} s",
        files=[
            save_plot(plot, out / f"{NAME}.png"),
            contact_sheet(out / f"{NAME}_frames.png", shown, labels=["clip", "coded"]).name,
        ],
        table=Table.of(
            ("form", "largest difference", "at chunk borders", "elsewhere"),
            [(name, largest[name], *_at_borders(gap, settings.chunk // 4)) for name, gap in gaps.items()],
            note="Latents coded in chunks against latents coded whole, per latent frame (largest over channels and "
            "pixels).",
        ),
        captions={
            f"{NAME}.png": "Difference of latents coded in chunks from latents coded whole, by latent frame.",
            f"{NAME}_frames.png": "The clip, and what comes back from its latents (150 steps of training).",
        },
    ).save(out)


def _train(model: CausalAutoencoder, settings: Settings, ticks: Iterable[int]) -> None:
    """Squared error of the clip that comes back."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.kaiming_normal_(p, nonlinearity="linear")
    scenes = replace(SCENES, frames=9)

    def loss(step: int, random: torch.Generator) -> Tensor:
        clip = scenes.batch(settings.batch, random).video * 2 - 1
        return (model(clip) - clip).square().mean()

    fit(model, loss, ticks, steps=settings.steps, lr=settings.lr)


def _at_borders(gap: Tensor, latents: int) -> tuple[float, float]:
    """Largest difference in the first and last frames of chunks, and in all others (0 if there are none)."""
    index = torch.arange(len(gap)) - 1
    border = (index % latents == 0) | (index % latents == latents - 1) | (index < 0)
    inside = gap[~border]
    return gap[border].max().item(), inside.max().item() if len(inside) else 0.0
