"""Whole models against frames: VDiTs that differ in their attention, computed by vdcore, naively, and by SDPA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vdcore import FrameMask
from vdcore.models import VDiT, VDiTConfig
from vdcore.models import attention as layers
from vdcore.testing import TORCH_FORMS
from vdcore_bench.measure import machine
from vdcore_bench.measure.journal import PROFILE, Journal, Row, Watch, row_here
from vdcore_bench.measure.memory import Peak, Timed, peak_of, predicted_peak, time_warm
from vdcore_bench.suites.models.calls import call_of
from vdcore_bench.suites.sweep import Estimate, Settings, follow, lacks_gpu, rows_of, without_gpu

WINDOW = 8  # frames of the past that the windowed variants see


def _variant(attention: str, **given: Any) -> VDiTConfig:
    """Two blocks of DiT-S (Peebles and Xie 2023): enough for what grows with frames, small enough for a CPU."""
    return VDiTConfig(width=384, depth=2, heads=6, attention=attention, position="rope", qk_norm=True, **given)


VARIANTS: dict[str, VDiTConfig] = {
    "vdit-factorized": _variant("factorized"),
    "vdit-gated": _variant("gated"),
    "vdit-full": _variant("full"),
    "vdit-windowed": _variant("full", mask=FrameMask.window(WINDOW)),
}
SIZE = 4, 32, 32  # channels, height and width of the latent video: 256 tokens per frame
NAIVE_OPS = ("spatial_attention", "temporal_attention", "video_attention", "gated_attention", "cross_attention")


@contextmanager
def attention_by(provider: str) -> Iterator[None]:
    """Inside, models compute attention by ``"vdcore"``, ``"naive"`` or ``"sdpa"``; all else stays vdcore's."""
    ours = {op: getattr(layers, op) for op in NAIVE_OPS}
    try:
        if provider != "vdcore":
            for op in NAIVE_OPS:
                setattr(layers, op, TORCH_FORMS[op][provider])
        yield
    finally:
        for op, function in ours.items():
            setattr(layers, op, function)


@dataclass(frozen=True)
class ModelPoint:
    """One variant at one number of frames, its attention computed by one provider."""

    variant: str
    provider: str
    frames: int
    mode: str = "fwd"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def config(self) -> VDiTConfig:
        return VARIANTS[self.variant]

    @property
    def tokens(self) -> int:
        """Per frame."""
        return SIZE[1] * SIZE[2] // math.prod(self.config.patch)

    def flops(self) -> float:
        """Products of a forward pass, of the pairs that the provider computes; thrice that with backward."""
        config, T, S = self.config, self.frames, self.tokens
        mask = config.frame_mask if self.provider == "vdcore" else FrameMask()
        branches = {"factorized": 2, "gated": 2}.get(config.attention, 1)
        pairs = T * S * S + S * T * T * mask.density(T) if branches == 2 else (T * S) ** 2 * mask.density(T)
        projections = (
            3 * branches + (2 if config.attention == "factorized" else 1) + 2 * config.mlp_ratio
        ) * config.width
        total = config.depth * config.width * (4 * pairs + 2 * T * S * projections)
        return total * (3.0 if "bwd" in self.mode else 1.0)

    def row(self) -> Row:
        """Everything but the numbers."""
        config = self.config
        shape = {"B": 1, "T": self.frames, "S": self.tokens, "H": config.heads, "G": config.heads, "D": config.head_dim}
        allocator = "torch" if self.device.startswith("cuda") else machine.DEFAULT_THRESHOLDS
        return row_here(
            self.device,
            self.dtype,
            op="vdit",
            workload=self.variant,
            provider=self.provider,
            mode=self.mode,
            case=f"{PROFILE}{config.depth} blocks",
            x=self.frames,
            flops=self.flops(),
            allocator=allocator,
            original=shape,
            shape=shape,
        )


# ---- What runs ----


def _step(point: ModelPoint, frames: int) -> tuple[VDiT, Callable[[], Any]]:
    """The model, and a call: a forward pass, or a training step's forward and backward."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(point.dtype)  # parameters of fake tensors cannot change theirs
    try:
        with torch.device(point.device):
            model = VDiT(point.config)
            video, timestep = torch.randn(1, SIZE[0], frames, *SIZE[1:]), torch.full((1,), 500.0)
    finally:
        torch.set_default_dtype(usual)
    return model, call_of(model, partial(model, video, timestep), point.mode)


@machine.returning_memory()
def measure_memory(point: ModelPoint) -> Peak:
    """Of one call beyond weights and video. For a fresh process."""
    with attention_by(point.provider):
        _step(point, 2)[1]()  # starts threads and loads code
        return peak_of(_step(point, point.frames)[1], point.device)


def measure_time(point: ModelPoint, need: int) -> Timed:
    """Of warm calls. For a fresh process."""
    with attention_by(point.provider):
        return time_warm(_step(point, point.frames)[1], point.device, need)


def predict_memory(point: ModelPoint) -> int:
    """Peak bytes of a call beyond weights and video, by running it on fake tensors."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), attention_by(point.provider):
        model, call = _step(point, point.frames)
        return predicted_peak(model, call)


# ---- Rows ----


def points(variants: Sequence[str], settings: Settings) -> list[list[ModelPoint]]:
    """One list per curve, in the order of frames. A backward pass is timed with its forward."""
    mode = "fwd+bwd" if "bwd" in settings.mode else "fwd"
    return [
        [ModelPoint(variant, provider, n, mode, settings.dtype, settings.device) for n in sorted(set(settings.frames))]
        for variant in variants
        for provider in settings.attentions
    ]


def run(variants: Sequence[str], settings: Settings, journal: Journal, watch: Watch) -> None:
    """Measures or predicts every point; rows stand in the journal as soon as they exist."""
    follow(
        points(variants, settings),
        lambda point, rate: measure(point, settings, rate),
        ModelPoint.flops,
        journal,
        lambda p, number, total: watch.step(f"{p.variant}, {p.provider}, {p.frames} frames", number, total),
        lambda point, rows: watch.done(rows),
    )


def measure(point: ModelPoint, settings: Settings, rate: float) -> list[Row]:
    """A memory row and a time row; predicted where the point would not fit the limits."""
    if lacks_gpu(point.device):
        return without_gpu(point.row())
    need = predict_memory(point)
    return rows_of(
        point.row(),
        Estimate(need, "by a run on fake tensors", point.flops() / rate if rate else 0.0),
        settings,
        partial(measure_memory, point),
        partial(measure_time, point),
        note=f"predicted {machine.bytes_text(need)}",
    )
