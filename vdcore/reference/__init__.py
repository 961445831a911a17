"""The oracles: every operator as plain PyTorch, in the dtype of its sums, one function an operator.

They are what the operators mean. Slow on purpose: nothing is hidden behind a mask, a hidden frame is not touched.
"""

from vdcore.reference.adaln import gate_residual, modulate
from vdcore.reference.cross_attention import cross_attention
from vdcore.reference.frame_attention import video_attention
from vdcore.reference.gated_attention import gated_attention
from vdcore.reference.patchify import patchify, unpatchify
from vdcore.reference.qk_norm_rope import qk_norm_rope
from vdcore.reference.temporal_attention import temporal_attention

__all__ = [
    "cross_attention",
    "gate_residual",
    "gated_attention",
    "modulate",
    "patchify",
    "qk_norm_rope",
    "temporal_attention",
    "unpatchify",
    "video_attention",
]
