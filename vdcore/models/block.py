"""A transformer block: modulated, gated residual layers, one after another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdcore.models.attention import (
    MLP,
    Context,
    CrossAttention,
    FullAttention,
    GatedAttention,
    SpatialAttention,
    TemporalAttention,
)
from vdcore.models.cache import Ring
from vdcore.models.config import VDiTConfig
from vdcore.models.layout import Layout, switch_layout
from vdcore.ops import gate_residual, modulate

LAYERS: dict[str, type[nn.Module]] = {
    "spatial": SpatialAttention,
    "temporal": TemporalAttention,
    "gated": GatedAttention,
    "full": FullAttention,
    "cross": CrossAttention,
    "mlp": MLP,
}


def layout_of(part: str, context: Context) -> Layout | None:
    """What a layer wants of tokens that several processes share; None: either."""
    assert context.split is not None
    if part == "temporal":
        return "frames" if context.split.plan == "halo" else "tokens"
    per_frame = context.text is not None and context.text.ndim == 4
    return "frames" if part in ("spatial", "gated", "full") or (part == "cross" and per_frame) else None


class AdaLNZero(nn.Module):
    """Shift, scale and gate of every layer from the condition, by a projection that starts at 0 (DiT)."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.proj = nn.Linear(width, rows * width)

    def forward(self, context: Context) -> Tensor:
        """``(B, n, C)``, or ``(B, T, n, C)`` with timesteps per frame."""
        return self.proj(context.activated).unflatten(-1, (self.rows, -1))


class AdaLNSingle(nn.Module):
    """A table of the block's own beside a projection that all blocks share (PixArt-alpha)."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(rows, width))

    def forward(self, context: Context) -> Tensor:
        assert context.modulation is not None
        return self.table + context.modulation


class Block(nn.Module):
    """``x = x + gate * layer(norm(x) * (1 + scale) + shift)`` for each layer; ``x = x + cross(x, text)``."""

    def __init__(self, config: VDiTConfig, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({part: LAYERS[part](config) for part in parts})
        rows = modulated_rows(parts)
        self.modulation = (AdaLNZero if config.modulation == "zero" else AdaLNSingle)(config.width, rows)

    def forward(self, x: Tensor, context: Context, ring: Ring | None = None) -> Tensor:
        """x ``(B, T, S, C)`` to the same shape; ``ring``: what the block remembers of earlier frames.

        With the frames split over ranks x is of this rank's frames, also where layers inside work on tokens.
        """
        rows = iter(self.modulation(context).unbind(-2))
        layout: Layout = "frames"
        for part, layer in self.layers.items():
            if context.split is not None:
                wanted = layout_of(part, context) or layout
                x, layout = switch_layout(x, layout, wanted, context.split), wanted
            if part == "cross":
                x = x + layer(x, context)
            else:
                given = [next(rows) for _ in range(3)]
                shift, scale, gate = map(context.of_own_frames, given) if layout == "frames" else given
                x = gate_residual(x, layer(modulate(x, shift, scale), context, ring), gate)
        return switch_layout(x, layout, "frames", context.split)


def modulated_rows(parts: tuple[str, ...]) -> int:
    """Shift, scale and gate for every layer but cross-attention."""
    return 3 * sum(part != "cross" for part in parts)


def looks_across_frames(parts: tuple[str, ...]) -> bool:
    return not {"temporal", "gated", "full"}.isdisjoint(parts)
