"""Oracle of gated attention."""

from __future__ import annotations

from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm, compute_dtype
from vdcore.ops.frame_attention.reference import video_attention
from vdcore.ops.temporal_attention.reference import temporal_attention
from vdcore.rope import Rope


def gated_attention(
    spatial: tuple[Tensor, Tensor, Tensor],
    temporal: tuple[Tensor, Tensor, Tensor],
    gate: Tensor,
    *,
    mask: FrameMask,
    lengths: Tensor | None,
    scale: float,
    spatial_norm: QKNorm | None,
    temporal_norm: QKNorm | None,
    spatial_rope: Rope | None,
    temporal_rope: Rope | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``gate * spatial_attention(*spatial) + (1 - gate) * temporal_attention(*temporal, mask)``, ``(B, T, S, H, D)``.

    Returns the result, the spatial part in q's dtype, and the lse of both parts, ``(B, T, S, H)``.
    """
    dtype = compute_dtype(spatial[0].dtype)
    q, k, v = (x.to(dtype) for x in spatial)  # the mix rounds once, at the end
    a, lse_a = video_attention(
        q,
        k,
        v,
        mask=FrameMask.same_frame(),
        q_start=0,
        lengths=lengths,
        text=None,
        text_lengths=None,
        text_norm=None,
        text_first=False,
        text_sees="all",
        scale=scale,
        norm=spatial_norm,
        rope=spatial_rope,
    )
    q, k, v = (x.to(dtype) for x in temporal)
    b, lse_b = temporal_attention(
        q,
        k,
        v,
        mask=mask,
        q_start=0,
        lengths=lengths,
        scale=scale,
        norm=temporal_norm,
        rope=temporal_rope,
    )
    a, g = a.reshape(b.shape), gate.to(dtype)
    out_dtype = spatial[0].dtype
    return (g * a + (1 - g) * b).to(out_dtype), a.to(out_dtype), lse_a.reshape(lse_b.shape), lse_b
