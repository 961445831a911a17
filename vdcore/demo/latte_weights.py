"""Latte's weights: the host's model of diffusers and ours with its weights give the same video."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdcore.demo.figure import Figure
from vdcore.demo.show import OFF, ON, new_plot, progress, save_plot, save_table
from vdcore.extras import need
from vdcore.models.latte import from_latte
from vdcore.testing import error_ratio

NAME = "latte_weights"


@dataclass(frozen=True)
class Settings:
    """Sizes; heads and head width are Latte-1's, depth and picture are cut to a small machine."""

    heads: int = 16
    head_dim: int = 72
    layers: int = 2
    text_width: int = 4096
    frames: int = 16
    latent: int = 16
    text: int = 20
    timesteps: tuple[int, ...] = (0, 250, 500, 750, 999)


def run(out: Path, settings: Settings = Settings()) -> Figure:
    """Runs both at several timesteps, judges ours by the host in float64; writes a plot, a table and the figure."""
    started = time.monotonic()
    rows = []
    with progress(NAME) as track, torch.no_grad():
        host = _host(settings)
        ours = from_latte(host)
        inputs = [_inputs(settings, t) for t in settings.timesteps]
        theirs = [_call(host, *x) for x in inputs]
        mine = [ours(x, t, text=text) for x, t, text in inputs]
        exact = _exact(host, inputs, track("the host in float64", len(inputs)))
    for t, a, b, e in zip(settings.timesteps, mine, theirs, exact):
        ratio = error_ratio(a, e, [b]).worst
        rows.append((t, ratio, _error(a, e), _error(b, e), e.abs().max().item()))
    worst = max(row[1] for row in rows)
    header = ("timestep", "error ratio", "our error", "the host's error", "largest value")
    files = [
        _plot(out, rows),
        save_table(out / f"{NAME}.md", header, rows, "Largest errors against the host's model in float64."),
    ]
    weights = sum(p.numel() for p in host.parameters())
    figure = Figure(
        name=NAME,
        claim="With the weights of diffusers' LatteTransformer3DModel a VDiT gives its output, "
        "within the tolerance rule.",
        numbers={
            "error_ratio": worst,
            "our_largest_error": max(r[2] for r in rows),
            "weights": weights,
            "weights_of_ours": sum(p.numel() for p in ours.parameters()),
        },
        compared_with={
            "error_ratio_allowed": 1.0,
            "the_hosts_own_largest_error": max(r[3] for r in rows),
            "largest_value": max(r[4] for r in rows),
        },
        passed=worst <= 1,
        size=f"random weights at Latte-1's width ({settings.heads} heads of {settings.head_dim}), {settings.layers} of "
        f"28 pairs of blocks, {settings.frames} frames of {settings.latent}x{settings.latent} latents, {settings.text} "
        f"text tokens; float32, against float64; {time.monotonic() - started:.0f} s",
        files=files,
    )
    figure.save(out)
    return figure


def _host(settings: Settings) -> Any:
    torch.manual_seed(0)
    width = settings.heads * settings.head_dim
    model = need("diffusers", "models", NAME).LatteTransformer3DModel(
        num_attention_heads=settings.heads, attention_head_dim=settings.head_dim, in_channels=4, out_channels=8,
        num_layers=settings.layers, cross_attention_dim=width, caption_channels=settings.text_width,
        sample_size=settings.latent, patch_size=2, attention_bias=True, activation_fn="gelu-approximate",
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, video_length=settings.frames,
    )  # fmt: skip
    for p in model.parameters():  # random, but of a size that every layer shows in the output
        torch.nn.init.normal_(p, std=0.5 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1)
    return model.eval()


def _inputs(settings: Settings, timestep: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(timestep)
    video = torch.randn(1, 4, settings.frames, settings.latent, settings.latent, generator=random)
    return video, torch.tensor([timestep]), torch.randn(1, settings.text, settings.text_width, generator=random)


def _call(host: Any, video: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    return host(video, timestep, encoder_hidden_states=text, enable_temporal_attentions=True, return_dict=False)[0]


def _exact(host: Any, inputs: list[tuple[Tensor, Tensor, Tensor]], ticks: Any) -> list[Tensor]:
    from vdcore_bench.float64 import Float64

    double, found = host.double(), []
    with Float64():
        for i in ticks:
            video, timestep, text = inputs[i]
            found.append(_call(double, video.double(), timestep, text.double()))
    return found


def _error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).abs().max().item()


def _plot(out: Path, rows: list[tuple[int, float, float, float, float]]) -> str:
    figure, axes = new_plot(6, 3.2)
    at = range(len(rows))
    axes[0][0].bar([i - 0.2 for i in at], [r[2] for r in rows], 0.4, color=ON, label="VDiT with Latte's weights")
    axes[0][0].bar([i + 0.2 for i in at], [r[3] for r in rows], 0.4, color=OFF, label="diffusers")
    axes[0][0].set(xticks=list(at), xlabel="timestep", ylabel="largest error against float64")
    axes[0][0].set_xticklabels([str(r[0]) for r in rows])
    axes[0][0].legend(fontsize=8)
    return save_plot(figure, out / f"{NAME}.png")
