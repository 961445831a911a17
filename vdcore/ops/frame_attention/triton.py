"""Spatial and video attention: norm and rope in a pass of their own, then kernels over tiles of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.grid_mask import HeadMasks
from vdcore.ops.call import Triple, empty_like
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.qk_norm_rope.triton import norm_rope_gradients, normalized_rotated
from vdcore.ops.triton import output_gradients, qkv_gradients, why_not, why_not_head, why_not_norm, why_not_tokens

if TYPE_CHECKING:
    from vdcore.ops.frame_attention import VideoCall


def _frame_why_not(c: VideoCall) -> str | None:
    if isinstance(c.mask, HeadMasks):
        return "it has no GridMask yet"
    norms = why_not_norm(c.q, c.k, c.norm) or (c.text and why_not_norm(c.text[0], c.text[1], c.text_norm)) or None
    return why_not(c.q) or why_not_head(c.q) or why_not_tokens(c.q, c.k) or norms


def _as_frames(text: Tensor) -> Tensor:
    """Text ``(B, L, heads, D)`` as frames of one token."""
    return text.unsqueeze(2)


def _seen(c: VideoCall) -> tuple[Tensor, Tensor, Tensor, Triple | None]:
    """q, k, v and text after norm and RoPE."""
    text = None
    if c.text is not None:
        q, k = (normalized_rotated(_as_frames(x), c.text_norm, role, None).squeeze(2) for role, x in zip("qk", c.text))
        text = (q, k, c.text[2])
    q = normalized_rotated(c.q, c.norm, "q", c.rope, c.q_start)
    return q, normalized_rotated(c.k, c.norm, "k", c.rope), c.v, text


def _visibility(c: VideoCall) -> dict[str, Any]:
    from vdcore_kernels.core.tokens import Lengths

    return {
        "mask": c.mask,
        "q_start": c.q_start,
        "lengths": Lengths(c.lengths, None, c.text_lengths),
        "text_first": c.text_first,
        "text_sees": c.text_sees == "all",
        "sm_scale": c.scale,
    }


def _frame(c: VideoCall) -> tuple[Tensor | None, ...]:
    from vdcore_kernels.frame_attention.forward import frame_forward

    out, lse = c.empty_outputs()
    q, k, v, text = _seen(c)
    frame_forward(q, k, v, text, out, lse, **_visibility(c))
    return out, lse


def _frame_backward(
    c: VideoCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore_kernels.frame_attention.backward import frame_backward
    from vdcore_kernels.qk_norm_rope.backward import live_frames

    out, lse = outputs
    dout, dlse = output_gradients(out, grads)
    found, gradients = qkv_gradients(c)
    text_gradients: Any = None
    if c.text is not None:
        text_gradients = tuple(empty_like(x) for x in c.text)
        found |= dict(zip(("text_q", "text_k", "text_v"), text_gradients))
    # Gradients of what the kernels see; a norm or rope takes those of q and k further.
    dq, dk = (empty_like(x) if c.norm or c.rope else dx for x, dx in zip((c.q, c.k), gradients))
    filled_text: Any = text_gradients
    if c.text_norm is not None:
        filled_text = (*(empty_like(x) for x in text_gradients[:2]), text_gradients[2])
    q, k, v, text = _seen(c)
    given: dict[str, Any] = {"out": out, "lse": lse, "dout": dout, "dlse": dlse, **_visibility(c)}
    frame_backward(q, k, v, text, gradients=(dq, dk, gradients[2]), text_gradients=filled_text, **given)
    if c.norm or c.rope:
        L = 0 if c.text is None else c.text[0].shape[1]
        live = live_frames(
            c.q,
            c.k,
            mask=c.frame_mask,
            q_start=c.q_start,
            lengths=c.lengths,
            text=L,
            text_lengths=c.text_lengths,
            text_sees=L > 0 and c.text_sees == "all",
        )
        rows = (("q", c.q, dq, c.q_start), ("k", c.k, dk, 0))
        for (role, x, dy, start), dx, alive in zip(rows, gradients, live):
            keep = c.packed is None
            norm_rope_gradients(found, x, dy, c.norm, role, c.rope, start, wanted, keep=keep, dx=dx, live=alive)
    if c.text is not None and c.text_norm is not None:
        live_text = None
        if c.text_lengths is not None:
            live_text = (torch.arange(c.text[0].shape[1], device=c.q.device) < c.text_lengths[:, None]).to(torch.int8)
        for i, role in enumerate("qk"):
            x, dy, dx = (_as_frames(y) for y in (c.text[i], filled_text[i], text_gradients[i]))
            norm_rope_gradients(
                found, x, dy, c.text_norm, role, None, 0, wanted, prefix="text_", keep=False, dx=dx, live=live_text
            )
    return found


FRAMES = Implementation(_frame, _frame_backward, _frame_why_not)
