"""For programs that know no operator of vdcore: exported graphs in torch's own operators.

    exported = torch.export.export(model, (), arguments).run_decompositions(vdcore.export.decompositions())
    torch.onnx.export(exported, ...)

Attention becomes torch's under a dense mask, which takes lengths that are known only when the graph runs; everything
else becomes its reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import default_decompositions

from vdcore.mask import FrameMask
from vdcore.norm import compute_dtype
from vdcore.ops.choose import BACKENDS, OVERLOADS
from vdcore.ops.operator import DECOMPOSE
from vdcore.ops.qk_norm_rope.reference import norm_rope

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``: torch's own, and all of vdcore's forward operators.

    Attention over many frames under a mask of frames is N x N there; gated attention takes no lengths. Gradients are
    not in the table.
    """
    table = dict(default_decompositions())
    for op, decompose in DECOMPOSE.items():
        table[OVERLOADS[op]] = decompose(_DENSE.get(op) or BACKENDS["reference"].operators[op].forward)
    return table


Outputs = tuple[Tensor | None, ...]


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of ``(B, n, H, D)`` to ``(B, m, G, D)`` under ``visible (B or 1, n, m)``, with its log-sum-exp."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if visible is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        visible = visible[:, None]
        scores = scores.masked_fill(~visible, -torch.inf)
        # Not every program agrees on rows that see nothing.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
        out = out.masked_fill(~visible.any(-1, keepdim=True), 0)
    return out.transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def _outputs(call: Any, out: Tensor, lse: Tensor) -> Outputs:
    wanted = call.return_lse or call.grad
    return out.to(call.q.dtype).contiguous(), lse.contiguous() if wanted else None


def _frames(call: Any) -> Tensor:
    """``(B or 1, T, T_k)``: which frame sees which, lengths included."""
    T, T_k, start = call.q.shape[1], call.k.shape[1], call.q_start
    visible = call.mask.visible(T, T_k, start).to(call.q.device)[None]
    if call.lengths is not None:
        lengths = call.lengths.to(call.q.device)[:, None, None]
        at = torch.arange(start, start + T, device=call.q.device)
        visible = visible & (at[:, None] < lengths) & (torch.arange(T_k, device=call.q.device) < lengths)
    return visible


def _positioned(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q and k with norm and rope, and v, in the dtype of computation."""
    q, k = norm_rope(call.q, call.k, call.norm, call.rope, call.q_start)
    return q, k, call.v.to(q.dtype)


def _temporal(call: Any) -> Outputs:
    B, S = call.q.shape[0], call.q.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in _positioned(call))  # (B*S, T, H, D)
    visible = _frames(call).expand(B, -1, -1).repeat_interleave(S, 0)
    out, lse = (x.unflatten(0, (B, S)).transpose(1, 2) for x in _attend(q, k, v, visible, call.scale))
    return _outputs(call, out, lse)


def _video(call: Any) -> Outputs:
    """The joint sequence ``(B, T*S + L, ...)``; frames on their own, if they see nothing else."""
    (B, T, S), T_k = call.q.shape[:3], call.k.shape[1]
    q, k, v = _positioned(call)
    alone = call.mask == FrameMask.same_frame() and call.text is None and call.lengths is None
    if alone and T_k == T:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        found = _attend(q, k, v, None, call.scale)
        return _outputs(call, *(x.unflatten(0, (B, T)).flatten(1, 2) for x in found))
    visible = _frames(call)
    visible = visible[:, :, None, :, None].expand(-1, T, S, T_k, S).flatten(3, 4).flatten(1, 2)  # (B or 1, T S, T_k S)
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    if call.text is not None:
        q, k, v, visible = _with_text(call, q, k, v, visible)
    out, lse = _attend(q, k, v, visible, call.scale)
    if call.text is not None and call.text_first:
        out, lse = (torch.cat((x[:, T * S :], x[:, : T * S]), 1) for x in (out, lse))
    return _outputs(call, out, lse)


def _with_text(call: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, ...]:
    """Text queries, keys and values after the video's, and which of all pairs are visible."""
    B, L, S = q.shape[0], call.text[0].shape[1], call.q.shape[2]
    text_q, text_k, text_v = (x.to(q.dtype) for x in call.text)
    if call.text_norm is not None:
        text_q, text_k = call.text_norm.q(text_q), call.text_norm.k(text_k)
    valid = torch.ones(B, L, dtype=torch.bool, device=q.device)
    if call.text_lengths is not None:
        valid = torch.arange(L, device=q.device) < call.text_lengths.to(q.device)[:, None]
    frames, start, T = call.k.shape[1], call.q_start, call.q.shape[1]
    alive = torch.ones(B, T, dtype=torch.bool, device=q.device)
    there = torch.ones(B, frames, dtype=torch.bool, device=q.device)
    if call.lengths is not None:
        lengths = call.lengths.to(q.device)[:, None]
        alive = torch.arange(start, start + T, device=q.device) < lengths
        there = torch.arange(frames, device=q.device) < lengths
    if call.text_sees != "all":
        there = torch.zeros_like(there)
    alive, there = (x.repeat_interleave(S, 1) for x in (alive, there))
    of_video = torch.cat((visible.expand(B, -1, -1), alive[:, :, None] & valid[:, None]), 2)
    of_text = valid[:, :, None] & torch.cat((there, valid), 1)[:, None]
    joined = (torch.cat(pair, 1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
    return *joined, torch.cat((of_video, of_text), 1)


def _cross(call: Any) -> Outputs:
    B, T, S, H, D = call.q.shape
    dtype, lengths = compute_dtype(call.q.dtype), call.lengths
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    if call.norm is not None:
        q, k = call.norm.q(q), call.norm.k(k)
    q = q.flatten(0, 1)  # (B*T, S, H, D)
    k, v = (x.flatten(0, 1) if x.ndim == 5 else x.repeat_interleave(T, 0) for x in (k, v))
    visible = None
    if lengths is not None:
        per_frame = lengths.flatten() if lengths.ndim == 2 else lengths.repeat_interleave(T)
        seen = torch.arange(k.shape[1], device=q.device) < per_frame.to(q.device)[:, None]
        visible = seen[:, None].expand(-1, S, -1)
    return _outputs(call, *(x.unflatten(0, (B, T)) for x in _attend(q, k, v, visible, call.scale)))


_DENSE = {
    "temporal_attention": _temporal,
    "video_attention": _video,
    "spatial_attention": _video,
    "cross_attention": _cross,
}
