"""From a host's projections to vdcore's operators: heads, norms, rotary tables, joint sequences."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import normalization
from torch import Tensor, nn

import vdcore
from vdcore.integrations.diffusers.clip import Clip
from vdcore.integrations.swap import is_plain
from vdcore.norm import QKNorm
from vdcore.parallel import video_attention as shared_attention
from vdcore.rope import Rope, Style

_RMS = (nn.RMSNorm, normalization.RMSNorm, normalization.MochiRMSNorm)
_LAYER = (nn.LayerNorm, normalization.FP32LayerNorm)


def heads(x: Tensor, count: int) -> Tensor:
    """``(..., H*D) -> (..., H, D)``."""
    return x.unflatten(-1, (count, -1))


def project(attn: Any, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q of x, k and v of the context or of x: ``(..., H, D)``. Fused projections give views of one tensor."""
    fused = getattr(attn, "fused_projections", False)
    if fused and context is None and hasattr(attn, "to_qkv"):
        q, k, v = attn.to_qkv(x).chunk(3, -1)
    elif fused and context is not None and hasattr(attn, "to_kv"):
        q, (k, v) = attn.to_q(x), attn.to_kv(context).chunk(2, -1)
    else:
        source = x if context is None else context
        q, k, v = attn.to_q(x), attn.to_k(source), attn.to_v(source)
    return heads(q, attn.heads), heads(k, attn.heads), heads(v, attn.heads)


def project_added(attn: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of text tokens with projections of their own: ``(B, L, H, D)``."""
    if getattr(attn, "fused_projections", False) and hasattr(attn, "to_added_qkv"):
        q, k, v = attn.to_added_qkv(text).chunk(3, -1)
    else:
        q, k, v = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    return heads(q, attn.heads), heads(k, attn.heads), heads(v, attn.heads)


def output_projection(attn: Any, x: Tensor) -> Tensor:
    """Merges heads ``(..., H, D)``, projects and drops out, as attention modules end."""
    x = x.flatten(-2)
    if getattr(attn, "to_out", None) is None:
        return x
    return attn.to_out[1](attn.to_out[0](x))


# ---- Norm and rope ----


def _weight(x: Tensor | None, like: Tensor) -> bool:
    return x is None or x.dtype in (like.dtype, torch.float32)


def qk_norm(
    q: Tensor, k: Tensor, norm_q: nn.Module | None, norm_k: nn.Module | None, *, default_eps: float | None = None
) -> tuple[Tensor, Tensor, QKNorm | None]:
    """q and k ``(..., H, D)`` with the norm that is still to be applied to them.

    Norms that vdcore supports are passed to the operator; others run here, in the host's own modules. A norm over H*D
    channels is one across heads.

    Args:
        default_eps: of a norm that has none.
    """
    if norm_q is None and norm_k is None:
        return q, k, None
    norm = _as_qk_norm(q, k, norm_q, norm_k, default_eps)
    if norm is not None:
        return q, k, norm
    return _apply(norm_q, q), _apply(norm_k, k), None


def _size(norm: Any) -> tuple[int, ...] | None:
    """The channels that a norm is over, where it says so."""
    size = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    return tuple(size) if isinstance(size, (tuple, list)) else None


def _apply(norm: Any, x: Tensor) -> Tensor:
    if norm is None:
        return x
    if _size(norm) in (None, x.shape[-1:]):
        return norm(x)
    return norm(x.flatten(-2)).unflatten(-1, x.shape[-2:])


def _as_qk_norm(q: Tensor, k: Tensor, norm_q: Any, norm_k: Any, default_eps: float | None) -> QKNorm | None:
    kind: Any = "rms" if type(norm_q) in _RMS else "layer" if type(norm_q) in _LAYER else None
    if kind is None or type(norm_q) is not type(norm_k) or not (is_plain(norm_q) and is_plain(norm_k)):
        return None
    eps = default_eps if norm_q.eps is None else norm_q.eps
    if eps is None or norm_q.eps != norm_k.eps:
        return None
    sizes = [_size(norm_q), _size(norm_k)]
    if sizes == [(q.shape[-1],)] * 2:
        over: Any = "head"
    elif sizes == [(x.shape[-1] * x.shape[-2],) for x in (q, k)]:
        over = "all"
    else:
        return None
    biases = getattr(norm_q, "bias", None), getattr(norm_k, "bias", None)
    if kind == "rms" and biases != (None, None):
        return None
    weights = norm_q.weight, norm_k.weight
    for x in (*weights, *biases):
        if not _weight(x, q):
            return None
    return QKNorm(*weights, kind, over, eps, *biases)


def as_rope(cos: Tensor, sin: Tensor, like: Tensor, split: tuple[int, int], style: Style = "interleaved") -> Rope:
    """Tables ``(N, R/2)`` or ``(N, H, R/2)`` over all tokens as frames and tokens."""
    tables = (x.to(like.device, x.dtype if _weight(x, like) else torch.float32) for x in (cos, sin))
    cos, sin = (x.unflatten(0, split) for x in tables)
    return Rope(cos, sin, style)


# ---- Attention ----


def same_batch(*given: Tensor) -> tuple[Tensor, ...]:
    """Tensors ``(B, ...)``, those of one sample repeated for all, as torch's own operations take them."""
    batch = given[0].shape[0]
    for x in given:
        if x.shape[0] != batch:
            break
    else:
        return given
    batch = max(x.shape[0] for x in given)
    return tuple(x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else x for x in given)


def video(clip: Clip, q: Tensor, k: Tensor, v: Tensor, norm: QKNorm | None, rope: Rope | None) -> Tensor:
    """Attention over all tokens of a clip: ``(B, N, H, D)`` in and out."""
    return over_clip(clip, q, k, v, norm=norm, rope=rope).flatten(1, 2)


def over_clip(clip: Clip, q: Tensor, k: Tensor, v: Tensor, *, text_first: bool = False, **rest: Any) -> Any:
    """Attention over all tokens of a clip ``(B, N, H, D)``, all of it here or shared with other ranks:
    ``(B, T, S, H, D)``, and with a text the text's as well.

    Args:
        text_first: where a text lies in the memory of the result, if this process has the clip.
        rest: of :func:`vdcore.video_attention`.
    """
    tokens = q.shape[1]
    q, k, v = (x.unflatten(1, clip.split(tokens)) for x in (q, k, v))
    if clip.probe is not None:
        clip.probe(q, k, v, clip.grid(tokens), rest)
    split = clip.shared(q.shape[1], q.shape[2])
    if split is None or clip.ranks is None:
        return vdcore.video_attention(q, k, v, text_first=text_first, **clip.masking(tokens), **rest)
    shares: dict[str, Any] = {"frames": split.sizes[0], "mask": clip.frame_mask, "plan": clip.ranks.plan}
    return shared_attention(q, k, v, mesh=split.peers, **shares, **rest)


def cross(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None, norm: QKNorm | None = None, scale: Any = None
) -> Tensor:
    """Attention of tokens ``(B, N, H, D)`` to others ``(B, L, G, D)``; either for all samples if it is of one."""
    if lengths is None:
        q, k, v = same_batch(q, k, v)
    out = vdcore.cross_attention(q.unsqueeze(1), k, v, lengths=lengths, norm=norm, scale=scale)
    return out.squeeze(1)
