"""Whole models against frames: VDiTs that differ in their attention, computed by vdcore, naively, and by SDPA."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vdcore.bench import machine
from vdcore.bench.curves import PROFILE
from vdcore.bench.memory import Peak, PointError, Timed, in_process, peak_of, predicted_peak, time_warm
from vdcore.bench.profile import Settings
from vdcore.bench.results import Journal, Row
from vdcore.bench.runner import DTYPE_NAMES
from vdcore.bench.timing import Spread

from vdcore import FrameMask
from vdcore.models import VDiT, VDiTConfig
from vdcore.models import attention as layers
from vdcore.testing import TORCH_FORMS

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
SIZE = 4, 32, 32  # channels, height and width of the latent video: 256 tokens a frame
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
        """In a frame."""
        return SIZE[1] * SIZE[2] // math.prod(self.config.patch)

    def flops(self) -> float:
        """Products of a forward pass, of the pairs that the provider computes; thrice that with backward."""
        config, T, S = self.config, self.frames, self.tokens
        mask = config.mask if self.provider == "vdcore" else FrameMask()
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
        return Row(
            op="vdit",
            workload=self.variant,
            provider=self.provider,
            mode=self.mode,
            case=f"{PROFILE}{config.depth} blocks",
            x=self.frames,
            flops=self.flops(),
            device=self.device,
            dtype=DTYPE_NAMES[self.dtype],
            threads=torch.get_num_threads(),
            allocator="torch" if self.device.startswith("cuda") else "glibc, default thresholds",
            original=shape,
            shape=shape,
            versions=machine.versions(),
            commit=machine.commit(),
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
    parameters = list(model.parameters())

    def forward() -> Tensor:
        with torch.no_grad():
            return model(video, timestep)

    def backward() -> Any:
        return torch.autograd.grad(model(video, timestep).float().sum(), parameters)

    return model, backward if "bwd" in point.mode else forward


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
    """One list a curve, in the order of frames. A backward pass is timed with its forward."""
    mode = "fwd+bwd" if "bwd" in settings.mode else "fwd"
    return [
        [ModelPoint(variant, provider, n, mode, settings.dtype, settings.device) for n in sorted(set(settings.frames))]
        for variant in variants
        for provider in settings.attentions
    ]


def run(
    variants: Sequence[str],
    settings: Settings,
    journal: Journal,
    watch: Callable[[str, int, int], None] = lambda what, number, total: None,
) -> None:
    """Measures or predicts every point; rows stand in the journal as soon as they exist.

    Args:
        watch: is told what is measured, its number, and how many there are.
    """
    curves = points(variants, settings)
    total, number = sum(map(len, curves)), 0
    for curve in curves:
        rate = 0.0  # FLOP/s of the last measured point of this curve
        for point in curve:
            watch(f"{point.variant}, {point.provider}, {point.frames} frames", number, total)
            rows = measure(point, settings, rate)
            journal.add(rows)
            number += 1
            took = next((r.p50 for r in rows if r.metric == "time" and r.status == "ok"), None)
            rate = point.flops() / took if took else rate


def measure(point: ModelPoint, settings: Settings, rate: float) -> list[Row]:
    """A memory row and a time row; predicted where the point would not fit the limits."""
    clock = point.row()
    memory = replace(clock, metric="memory", unit="bytes")
    if point.device.startswith("cuda") and not torch.cuda.is_available():
        reason = "no GPU is visible to torch"
        return [replace(row, status="skipped", reason=reason) for row in (memory, clock)]
    need = predict_memory(point)
    limit = min(settings.memory_limit, machine.memory_limit(point.device))
    guess = point.flops() / rate if rate else 0.0
    if need > limit or guess > settings.time_limit or time.monotonic() > settings.until:
        says = [f"needs {machine.bytes_text(need)} by a run on fake tensors, the limit is {machine.bytes_text(limit)}"]
        if guess:
            says.append(f"about {machine.seconds_text(guess)} a call at the rate of the point before")
        reason = "; ".join(says)
        predicted = replace(memory, status="predicted", p50=float(need), reason=reason)
        return [predicted, replace(clock, status="predicted", p50=guess or None, reason=reason)]
    try:
        found = in_process(measure_memory, point)
        peak = float(found.bytes)
        memory = replace(
            memory, p20=peak, p50=peak, p80=peak, samples=1, reason=f"predicted {machine.bytes_text(need)}"
        )
        if found.seconds > 2 * settings.time_limit:
            timed = Timed(Spread.of([found.seconds]), clock.allocator)
        else:
            timed = in_process(measure_time, point, int(peak))
    except PointError as error:
        return [replace(row, status="failed", reason=str(error)[:300]) for row in (memory, clock)]
    s = timed.spread
    clock = replace(clock, p20=s.p20, p50=s.p50, p80=s.p80, samples=s.samples, allocator=timed.allocator)
    return [memory, clock]
