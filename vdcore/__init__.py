"""The attention engine of video diffusion.

Tokens are ``(batch, frames, tokens, heads, channels)``, any strides; masks are :class:`FrameMask` and
:class:`GridMask`. Every operator is differentiable and runs on the fastest backend that can run it exactly;
:func:`explain` says which and why.
"""

from vdcore._version import __version__
from vdcore.geometry import as_frames
from vdcore.grid_mask import GridMask
from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.ops import (
    cross_attention,
    explain,
    gate_residual,
    gated_attention,
    kept_mass,
    modulate,
    patchify,
    qk_norm_rope,
    select_tiles,
    spatial_attention,
    temporal_attention,
    tile_attention,
    unpatchify,
    video_attention,
)
from vdcore.ops.choose import BackendError, backends, calls, use_backend
from vdcore.ops.derivatives import double_backward
from vdcore.rope import Rope, axial_rope
from vdcore.tile_lists import TileLists

__all__ = [
    "BackendError",
    "FrameMask",
    "GridMask",
    "QKNorm",
    "Rope",
    "TileLists",
    "__version__",
    "as_frames",
    "axial_rope",
    "backends",
    "calls",
    "cross_attention",
    "double_backward",
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
    "use_backend",
    "video_attention",
]
