"""Models of the sizes that people train, named after their workloads in ``bench/vdcore_bench/workloads.json``."""

from __future__ import annotations

from vdcore.mask import FrameMask
from vdcore.models.config import VDiTConfig


def _latte(**given: object) -> VDiTConfig:
    """Latte's and STDiT's common part: spatial and temporal blocks by turns under adaLN-single."""
    sizes = {"width": 16 * 72, "heads": 16, "depth": 56, "attention": "alternating", "modulation": "single"}
    return VDiTConfig(**{**sizes, "text_width": 4096, "base_size": 32, **given})  # type: ignore[arg-type]


def _full(channels: int, heads: int, head_dim: int, depth: int, **given: object) -> VDiTConfig:
    """Attention over all tokens, rotary positions, QK-norm, text by cross-attention."""
    sizes = {"in_channels": channels, "width": heads * head_dim, "heads": heads, "depth": depth}
    style = {"attention": "full", "modulation": "single", "position": "rope", "qk_norm": True, "text_width": 4096}
    return VDiTConfig(**{**sizes, **style, **given})  # type: ignore[arg-type]


# Shapes are the workloads' own; what surrounds attention is VDiT's: models that join text to the sequence get it by
# cross-attention, norms across all heads become norms per head. U-Nets (SVD, AnimateDiff, DynamiCrafter) have none.
PRESETS: dict[str, VDiTConfig] = {
    "dit-xl2-512": VDiTConfig(width=16 * 72, heads=16, depth=28, attention="spatial", classes=1000),
    "latte-1-512": _latte(),
    "stdit3-720p-102f": _latte(position="sincos+rope", qk_norm=True, temporal_cross=True, base_size=None),
    "mochi-1-480p": _full(12, 24, 128, 48),
    "pyramid-flow-768p": _full(16, 30, 64, 24, mask=FrameMask.causal()),
    "wan2.2-a14b-720p": _full(16, 40, 128, 40),
    "wan2.2-5b-704p": _full(48, 24, 128, 30),
    "hunyuanvideo-720p": _full(16, 24, 128, 60, rope_theta=256.0),
    "opensora2-576p": _full(16, 24, 128, 57),
    "cogvideox-5b": _full(16, 48, 64, 42),
    "ltx-2b-704p": _full(128, 32, 64, 28, patch=(1, 1, 1)),
    "cosmos-predict2-2b": _full(16, 16, 128, 28),
    "self-forcing-1.3b": _full(16, 12, 128, 30, mask=FrameMask(future=0, chunk=3)),
    "magi-1-24b-chunk": _full(16, 48, 128, 48, kv_heads=8, mask=FrameMask(past=4, future=0, chunk=6)),
    "longlive2-5b": _full(48, 24, 128, 30, mask=FrameMask(past=12, future=0, sink=8)),
    "long-video-60f": _full(48, 24, 128, 30, mask=FrameMask.window(30)),
    "long-video-120f": _full(48, 24, 128, 30, mask=FrameMask.window(30)),
    "long-video-240f": _full(48, 24, 128, 30, mask=FrameMask.window(30)),
}
