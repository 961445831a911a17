"""The public operators, one room each: checks, a call, and what runs it on every backend."""

from vdcore.ops.adaln import gate_residual, modulate
from vdcore.ops.cross_attention import cross_attention
from vdcore.ops.frame_attention import spatial_attention, video_attention
from vdcore.ops.gated_attention import gated_attention
from vdcore.ops.operator import explain
from vdcore.ops.patchify import patchify, unpatchify
from vdcore.ops.qk_norm_rope import qk_norm_rope
from vdcore.ops.temporal_attention import temporal_attention
from vdcore.ops.tile_attention import kept_mass, select_tiles, tile_attention

__all__ = [
    "cross_attention",
    "explain",
    "gate_residual",
    "gated_attention",
    "kept_mass",
    "modulate",
    "patchify",
    "qk_norm_rope",
    "select_tiles",
    "spatial_attention",
    "temporal_attention",
    "tile_attention",
    "unpatchify",
    "video_attention",
]
