"""Causal encoder: a clip coded in chunks is the clip coded whole, without a seam; one that looks ahead leaves seams."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.show import OFF, ON, new_plot, progress, save_plot, save_table
from vdcore.diffusion.training import SCENES
from vdcore.models.autoencoder import AutoencoderConfig, CausalAutoencoder
from vdcore.testing import error_ratio
from vdcore.video import contact_sheet

NAME = "causal_encoder"
SEAM = 100.0  # times the causal form's error that the other form's seam is at least


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
    with progress(NAME) as track:
        for model, label in ((causal, "causal"), (ahead, "looking ahead")):
            torch.manual_seed(0)
            _train(model, settings, track(label, settings.steps))
    clip = (
        replace(SCENES, frames=settings.frames, speed=(0.3, 0.8)).batch(1, torch.Generator().manual_seed(9)).video * 2
        - 1
    )
    with torch.no_grad():
        results = {name: (m.encode(clip), m.encode(clip, chunk=settings.chunk)) for name, m in _named(causal, ahead)}
        double = CausalAutoencoder(causal.config).double()
        double.load_state_dict(causal.state_dict())
        exact = double.encode(clip.double())
        back = causal(clip)
        decoded = causal.decode(results["causal"][1], chunk=1)
        decoded_exact = double.decode(exact)
    ratio = max(
        error_ratio(results["causal"][1], exact, [results["causal"][0]]).worst,
        error_ratio(decoded, decoded_exact, [back]).worst,
    )
    gaps = {name: _gap(*pair) for name, pair in results.items()}
    largest = {name: gap.max().item() for name, gap in gaps.items()}
    psnr = 10 * torch.log10(4 / (back - clip).square().mean()).item()
    shown = [((x[0] + 1) / 2).clamp(0, 1) for x in (clip, back)]
    files = [
        _plot(out, gaps, settings.chunk // 4),
        contact_sheet(out / f"{NAME}_frames.png", shown, labels=["clip", "coded"]).name,
        save_table(
            out / f"{NAME}.md",
            ("form", "largest difference", "at chunk borders", "elsewhere"),
            [(name, largest[name], *_at_borders(gap, settings.chunk // 4)) for name, gap in gaps.items()],
            "Latents coded in chunks against latents coded whole, per latent frame (largest over channels and pixels).",
        ),
    ]
    figure = Figure(
        name=NAME,
        claim=f"Coding a clip in chunks of {settings.chunk} frames equals coding it whole within the tolerance rule, "
        f"there and back; the form that looks ahead is off by at least {SEAM:.0f} times as much.",
        numbers={
            "error_ratio": ratio,
            "largest_difference": largest["causal"],
            "psnr_db": psnr,
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
        files=files,
    )
    figure.save(out)
    return figure


def _named(causal: CausalAutoencoder, ahead: CausalAutoencoder) -> tuple[tuple[str, CausalAutoencoder], ...]:
    return ("causal", causal), ("looking ahead", ahead)


def _train(model: CausalAutoencoder, settings: Settings, ticks: object) -> None:
    """Squared error of the clip that comes back."""
    random, scenes = torch.Generator().manual_seed(0), replace(SCENES, frames=9)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.kaiming_normal_(p, nonlinearity="linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.steps + 1, pct_start=0.2)
    for _ in ticks:  # type: ignore[attr-defined]
        clip = scenes.batch(settings.batch, random).video * 2 - 1
        loss = (model(clip) - clip).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _gap(whole: Tensor, chunks: Tensor) -> Tensor:
    """Largest difference per latent frame."""
    return (whole - chunks).abs().amax((0, 1, 3, 4))


def _at_borders(gap: Tensor, latents: int) -> tuple[float, float]:
    """Largest difference in the first and last frames of chunks, and in all others (0 if there are none)."""
    index = torch.arange(len(gap)) - 1
    border = (index % latents == 0) | (index % latents == latents - 1) | (index < 0)
    inside = gap[~border]
    return gap[border].max().item(), inside.max().item() if len(inside) else 0.0


def _plot(out: Path, gaps: dict[str, Tensor], latents: int) -> str:
    figure, axes = new_plot(7, 3.6)
    for (name, gap), colour in zip(gaps.items(), (ON, OFF)):
        axes[0][0].plot(gap.clamp(min=1e-9).tolist(), color=colour, marker="o", markersize=4, label=name)
    axes[0][0].set(xlabel="latent frame", ylabel="|in chunks - whole|, largest", yscale="log")
    axes[0][0].legend()
    return save_plot(figure, out / f"{NAME}.png")
