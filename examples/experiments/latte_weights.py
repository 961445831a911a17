"""Latte's weights: diffusers' model and ours with its weights give the same video.

The model of diffusers gets random weights, and a VDiT of vdcore the same ones. Both run on the same noisy latents and
text, and are compared with the first of them in float64: the VDiT may err as much as float32 makes the original err
(an error ratio of at most 1).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.figure import Figure
from experiments.show import OFF, ON, new_plot, progress, save_plot
from vdcore.extras import need
from vdcore.models.latte import from_latte
from vdcore.testing import error_ratio
from vdcore_bench.report.table import Table

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
    from vdcore_bench.measure.float64 import Float64

    started = time.monotonic()
    rows = []
    with progress(NAME) as track, torch.no_grad():
        host = _host(settings)
        ours = from_latte(host)
        weights = [sum(p.numel() for p in model.parameters()) for model in (host, ours)]
        inputs = [_inputs(settings, t) for t in settings.timesteps]
        theirs = [_call(host, *x) for x in inputs]
        mine = [ours(video, timestep, text=text) for video, timestep, text in inputs]
        host.double()
        with Float64():
            ticks = track("the host in float64", len(inputs))
            exact = [_call(host, *(x.double() if x.is_floating_point() else x for x in inputs[i])) for i in ticks]
    for t, ours_t, theirs_t, exact_t in zip(settings.timesteps, mine, theirs, exact):
        errors = [(x.double() - exact_t).abs().max().item() for x in (ours_t, theirs_t)]
        rows.append((t, error_ratio(ours_t, exact_t, [theirs_t]).worst, *errors, exact_t.abs().max().item()))
    _, ratios, our_errors, host_errors, largest = zip(*rows)
    header = ("timestep", "error ratio", "our error", "the host's error", "largest value")
    return Figure(
        name=NAME,
        claim="With the weights of diffusers' LatteTransformer3DModel a VDiT gives its output, "
        "within the tolerance rule.",
        numbers={
            "error_ratio": max(ratios),
            "our_largest_error": max(our_errors),
            "weights": weights[0],
            "weights_of_ours": weights[1],
        },
        compared_with={
            "error_ratio_allowed": 1.0,
            "the_hosts_own_largest_error": max(host_errors),
            "largest_value": max(largest),
        },
        passed=max(ratios) <= 1,
        size=f"random weights at Latte-1's width ({settings.heads} heads of {settings.head_dim}), {settings.layers} of "
        f"28 pairs of blocks, {settings.frames} frames of {settings.latent}x{settings.latent} latents, {settings.text} "
        f"text tokens; float32, against float64; {time.monotonic() - started:.0f} s",
        files=[_plot(out, settings.timesteps, our_errors, host_errors)],
        table=Table.of(header, rows, note="Largest errors against the host's model in float64."),
        captions={f"{NAME}.png": "Largest error of both in float32, by timestep; bars should be of one size."},
    ).save(out)


def _host(settings: Settings) -> Any:
    torch.manual_seed(0)
    width = settings.heads * settings.head_dim
    model = need("diffusers", "models", NAME).LatteTransformer3DModel(
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=settings.layers,
        cross_attention_dim=width,
        caption_channels=settings.text_width,
        sample_size=settings.latent,
        patch_size=2,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=settings.frames,
    )
    for p in model.parameters():  # random, but of a size that every layer shows in the output
        torch.nn.init.normal_(p, std=0.5 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1)
    return model.eval()


def _inputs(settings: Settings, timestep: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(timestep)
    video = torch.randn(1, 4, settings.frames, settings.latent, settings.latent, generator=random)
    return video, torch.tensor([timestep]), torch.randn(1, settings.text, settings.text_width, generator=random)


def _call(host: Any, video: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    return host(video, timestep, encoder_hidden_states=text, enable_temporal_attentions=True, return_dict=False)[0]


def _plot(out: Path, timesteps: tuple[int, ...], ours: tuple[float, ...], host: tuple[float, ...]) -> str:
    figure, axes = new_plot(6, 3.2)
    at = range(len(timesteps))
    axes[0][0].bar([i - 0.2 for i in at], ours, 0.4, color=ON, label="VDiT with Latte's weights")
    axes[0][0].bar([i + 0.2 for i in at], host, 0.4, color=OFF, label="diffusers")
    axes[0][0].set(xlabel="timestep", ylabel="largest error against float64")
    axes[0][0].set_xticks(at, [str(t) for t in timesteps])
    axes[0][0].legend(fontsize=8)
    return save_plot(figure, out / f"{NAME}.png")
