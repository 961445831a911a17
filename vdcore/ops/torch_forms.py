"""Every operator as plain PyTorch users write it: dense, with masks of all pairs, in the dtype of its inputs.

They give the error that the tolerance rule allows, and the baseline that benchmarks measure: ``naive`` materialises all
scores, ``sdpa`` calls torch's fused attention. Same arguments as the public functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm, compute_dtype
from vdcore.ops.adaln import reference as adaln
from vdcore.ops.patchify import reference as patches
from vdcore.ops.qk_norm_rope import reference as norm_rope
from vdcore.rope import Rope

Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float], Tensor]


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` with all scores in memory: q ``(..., n, D)``, k and v ``(..., m, D)``."""
    scores = q @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _log_sum_exp(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = q.to(compute_dtype(q.dtype)) @ k.to(compute_dtype(k.dtype)).mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.logsumexp(-1)


def _dense(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``(N, n, H, D)`` to ``(N, m, G, D)`` under a mask broadcastable to ``(N, H, n, m)``."""
    heads = q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) if x.shape[2] != heads else x for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seen = None
    if mask is not None:
        seen = mask.any(-1, keepdim=True)
        open_mask = mask | ~seen  # a row that sees nothing attends to everything, and is thrown away
        out = attend(q, k, v, open_mask, scale)
        out = torch.where(seen, out, torch.zeros_like(out))
    else:
        out = attend(q, k, v, None, scale)
    lse = None
    if return_lse:
        lse = _log_sum_exp(q, k, None if mask is None else open_mask, scale)
        if seen is not None:
            lse = torch.where(seen[..., 0], lse, torch.full_like(lse, -torch.inf))
        lse = lse.transpose(1, 2)
    return out.transpose(1, 2), lse


def _norm_rope(q: Tensor, k: Tensor, norm: QKNorm | None, rope: Rope | None, start: int) -> tuple[Tensor, Tensor]:
    """As hosts do it: in float32, rounded to the model's dtype."""
    dtype = q.dtype
    if norm is not None:
        q, k = norm.q(q), norm.k(k)
    if rope is not None:
        q, k = rope.rotate(q, start), rope.rotate(k)
    return q.to(dtype), k.to(dtype)


def _frame_mask(
    mask: FrameMask, T: int, T_k: int, start: int, lengths: Tensor | None, device: torch.device
) -> Tensor | None:
    """``(1 or B, T, T_k)`` or None for all."""
    if mask == FrameMask() and lengths is None:
        return None
    seen = mask.visible(T, T_k, start).to(device)[None]
    if lengths is not None:
        valid = torch.arange(T_k, device=device) < lengths[:, None]
        alive = torch.arange(start, start + T, device=device) < lengths[:, None]
        seen = seen & valid[:, None, :] & alive[:, :, None]
    return seen


def _unpack(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (q, k, v) if k is not None and v is not None else q.unbind(3)  # type: ignore[return-value]


def _temporal(
    attend: Attend,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: FrameMask = FrameMask(),
    q_start: int | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    return_lse: bool = False,
) -> Any:
    q, k, v = _unpack(q, k, v)
    B, T, S, _, D = q.shape
    T_k = k.shape[1]
    start = max(T_k - T, 0) if q_start is None else q_start
    q, k = _norm_rope(q, k, norm, rope, start)
    seen = _frame_mask(mask, T, T_k, start, lengths, q.device)
    if seen is not None:
        seen = seen[:, None, None].expand(B, S, 1, T, T_k).flatten(0, 1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B*S, T, heads, D)
    out, lse = _dense(attend, q, k, v, seen, D**-0.5 if scale is None else scale, return_lse)
    out = out.unflatten(0, (B, S)).transpose(1, 2)
    return (out, lse.unflatten(0, (B, S)).transpose(1, 2)) if lse is not None else out


def _video(
    attend: Attend,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    mask: FrameMask = FrameMask(),
    q_start: int | None = None,
    lengths: Tensor | None = None,
    text: tuple[Tensor, Tensor, Tensor] | None = None,
    text_lengths: Tensor | None = None,
    text_norm: QKNorm | None = None,
    text_first: bool = False,
    text_sees: str = "all",
    scale: float | None = None,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    return_lse: bool = False,
) -> Any:
    q, k, v = _unpack(q, k, v)
    B, T, S, _, D = q.shape
    T_k = k.shape[1]
    start = max(T_k - T, 0) if q_start is None else q_start
    scale = D**-0.5 if scale is None else scale
    q, k = _norm_rope(q, k, norm, rope, start)
    frames = _frame_mask(mask, T, T_k, start, lengths, q.device)
    seen = None if frames is None else frames.repeat_interleave(S, 1).repeat_interleave(S, 2)
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    if text is not None:
        L = text[0].shape[1]
        tq, tk = _norm_rope(text[0], text[1], text_norm, None, 0)
        q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), (tq, tk, text[2])))
        n, m = T * S, T_k * S
        device = q.device
        whole = torch.ones(B, n + L, m + L, dtype=torch.bool, device=device)
        if seen is not None:
            whole[:, :n, :m] = seen
        if lengths is not None:
            alive = (torch.arange(start, start + T, device=device) < lengths[:, None]).repeat_interleave(S, 1)
            valid = (torch.arange(T_k, device=device) < lengths[:, None]).repeat_interleave(S, 1)
            whole[:, :n] &= alive[..., None]
            whole[:, n:, :m] &= valid[:, None]
        if text_sees == "text":
            whole[:, n:, :m] = False
        if text_lengths is not None:
            live = torch.arange(L, device=device) < text_lengths[:, None]
            whole[:, :, m:] &= live[:, None]
            whole[:, n:] &= live[..., None]
        seen = whole
    out, lse = _dense(attend, q, k, v, None if seen is None else seen[:, None], scale, return_lse)

    def split(x: Tensor) -> Any:
        if text is None:
            return x.unflatten(1, (T, S))
        return x[:, : T * S].unflatten(1, (T, S)), x[:, T * S :]

    return (split(out), split(lse)) if lse is not None else split(out)


def _spatial(
    attend: Attend,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    norm: QKNorm | None = None,
    rope: Rope | None = None,
    return_lse: bool = False,
) -> Any:
    q, k, v = _unpack(q, k, v)
    B, T = q.shape[:2]
    q, k = _norm_rope(q, k, norm, rope, 0)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = _dense(attend, q, k, v, None, q.shape[-1] ** -0.5 if scale is None else scale, return_lse)
    out = out.unflatten(0, (B, T))
    return (out, lse.unflatten(0, (B, T))) if lse is not None else out


def _gated(
    attend: Attend,
    spatial: tuple[Tensor, Tensor, Tensor],
    temporal: tuple[Tensor, Tensor, Tensor],
    gate: Tensor,
    *,
    mask: FrameMask = FrameMask(),
    lengths: Tensor | None = None,
    scale: float | None = None,
    norm: tuple[QKNorm | None, QKNorm | None] = (None, None),
    rope: tuple[Rope | None, Rope | None] = (None, None),
) -> Tensor:
    common: dict[str, Any] = {"scale": scale, "lengths": lengths, "q_start": 0}
    a = _video(attend, *spatial, mask=FrameMask.same_frame(), norm=norm[0], rope=rope[0], **common)
    b = _temporal(attend, *temporal, mask=mask, norm=norm[1], rope=rope[1], **common)
    return (gate * a + (1 - gate) * b).to(a.dtype)


def _cross(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    norm: QKNorm | None = None,
    return_lse: bool = False,
) -> Any:
    B, T, S, _, D = q.shape
    if norm is not None:
        q, k = norm.q(q).to(q.dtype), norm.k(k).to(k.dtype)
    L = k.shape[-3]
    if k.ndim == 4:
        k, v = (x[:, None].expand(B, T, *x.shape[1:]) for x in (k, v))
    seen = None
    if lengths is not None:
        valid = lengths.reshape(B, -1).expand(B, T)
        seen = (torch.arange(L, device=q.device) < valid[..., None]).flatten(0, 1)[:, None, None]
        seen = seen.expand(B * T, 1, S, L)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = _dense(attend, q, k, v, seen, D**-0.5 if scale is None else scale, return_lse)
    out = out.unflatten(0, (B, T))
    return (out, lse.unflatten(0, (B, T))) if lse is not None else out


# ---- Not attention: the reference in float32, rounded ----


def _qk_norm_rope(
    q: Tensor, k: Tensor, *, norm: QKNorm | None = None, rope: Rope | None = None, frame_start: int = 0
) -> tuple[Tensor, Tensor]:
    return norm_rope.qk_norm_rope(q, k, norm=norm, rope=rope, frame_start=frame_start)


def _unpatchify(
    tokens: Tensor, weight: Tensor, bias: Tensor | None = None, *, order: str = "pt ph pw c", **kwargs: Any
) -> Tensor:
    return patches.unpatchify(tokens, weight, bias, order=order, **kwargs)


def _patchify(video: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return patches.patchify(video, weight, bias)


def _modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    kind: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    return adaln.modulate(x, shift, scale, kind=kind, weight=weight, bias=bias, eps=eps)


def _both(form: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    def with_naive(*args: Any, **kwargs: Any) -> Any:
        return form(naive, *args, **kwargs)

    def with_sdpa(*args: Any, **kwargs: Any) -> Any:
        return form(sdpa, *args, **kwargs)

    return {"naive": with_naive, "sdpa": with_sdpa}


TORCH_FORMS: dict[str, dict[str, Callable[..., Any]]] = {
    "spatial_attention": _both(_spatial),
    "video_attention": _both(_video),
    "temporal_attention": _both(_temporal),
    "gated_attention": _both(_gated),
    "cross_attention": _both(_cross),
    "qk_norm_rope": {"eager": _qk_norm_rope},
    "patchify": {"eager": _patchify},
    "unpatchify": {"eager": _unpatchify},
    "modulate": {"eager": _modulate},
    "gate_residual": {"eager": adaln.gate_residual},
}
