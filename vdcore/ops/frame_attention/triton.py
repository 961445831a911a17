"""Spatial and video attention: norm and rope in a pass of their own, then kernels over tiles of tokens."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.grid_mask import GridMask, HeadMasks
from vdcore.ops.call import Triple, empty_like
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.qk_norm_rope.triton import norm_rope_gradients, normalized_rotated
from vdcore.ops.temporal_attention.tangents import prepared, qkv_duals
from vdcore.ops.triton import (
    output_gradients,
    qkv_gradients,
    why_not,
    why_not_boxes,
    why_not_head,
    why_not_norm,
    why_not_tangents,
    why_not_tokens,
)

if TYPE_CHECKING:
    from vdcore.ops.frame_attention import VideoCall


MAX_GRID = 2**13  # a place less a window's begin or end in a half of a number


def _frame_why_not(c: VideoCall) -> str | None:
    if isinstance(c.mask, HeadMasks):
        if max(c.mask.grid) >= MAX_GRID:
            return f"it has less than {MAX_GRID} rows and columns of tokens"
        if (reason := why_not_boxes(c.q)) is not None:
            return reason
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


def _problem(c: VideoCall) -> Any:
    """The call as its kernels take it: under masks of frames, or under masks of a grid."""
    from vdcore_kernels.core.tokens import Lengths
    from vdcore_kernels.frame_attention.problem import FrameProblem
    from vdcore_kernels.tile_attention.problem import BoxProblem

    q, k, v, text = _seen(c)
    given: dict[str, Any] = {
        "sm_scale": c.scale,
        "q_start": c.q_start,
        "lengths": Lengths(c.lengths, None, c.text_lengths),
        "text": text,
        "text_first": c.text_first,
        "text_sees": c.text_sees == "all",
    }
    if isinstance(c.mask, HeadMasks):
        return BoxProblem(q, k, v, mask=c.mask, grid=c.mask.grid, **given)
    return FrameProblem(q, k, v, mask=c.mask, **given)


def _frame(c: VideoCall) -> tuple[Tensor | None, ...]:
    from vdcore_kernels.frame_attention.forward import frame_forward
    from vdcore_kernels.tile_attention.forward import tile_forward

    out, lse = c.empty_outputs()
    (tile_forward if isinstance(c.mask, HeadMasks) else frame_forward)(_problem(c), out, lse)
    return out, lse


def _live_frames(c: VideoCall) -> tuple[Tensor | None, Tensor | None]:
    """Which frames of q and of k take part ``(B, T)``; None: all."""
    from vdcore_kernels.qk_norm_rope.backward import live_frames

    L = 0 if c.text is None else c.text[0].shape[1]
    return live_frames(
        c.q,
        c.k,
        mask=c.frame_mask,
        q_start=c.q_start,
        lengths=c.lengths,
        text=L,
        text_lengths=c.text_lengths,
        text_sees=L > 0 and c.text_sees == "all",
    )


@lru_cache(maxsize=64)
def _first_seen(mask: GridMask, T: int, T_k: int, q_start: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every query frame the first key frame that it sees, T_k: none; of every key frame the first that sees it."""
    seen, seeing = torch.full((T,), T_k), torch.full((T_k,), T)
    for t, runs in reversed(list(enumerate(mask.frame_runs(T, T_k, q_start)))):
        for begin, end in reversed(runs):
            seen[t] = begin
            seeing[begin:end] = t
    return seen.to(device), seeing.to(device)


def _live_under(mask: GridMask, c: VideoCall) -> tuple[Tensor, Tensor]:
    """The same, bool, under the windows of some heads: whatever its row and column, a token sees its own place."""
    (B, T), T_k = c.q.shape[:2], c.k.shape[1]
    seen, seeing = _first_seen(mask, T, T_k, c.q_start, c.q.device)
    zero = torch.zeros(B, 1, dtype=torch.int64, device=c.q.device)
    most = max(T_k, c.q_start + T)
    lengths = zero + most if c.lengths is None else c.lengths[:, None].clamp(0, most)
    alive = (lengths - c.q_start).clamp(0, T)
    shown = lengths.clamp(max=T_k)
    valid = torch.where(alive > 0, shown, 0)
    text = zero if c.text is None else zero + c.text[0].shape[1]
    if c.text_lengths is not None:
        text = torch.minimum(c.text_lengths[:, None], text)
    t, g = (torch.arange(n, device=c.q.device) for n in (T, T_k))
    of_q = (t < alive) & ((seen < valid) | (text > 0))
    of_k = (g < valid) & (seeing < alive)
    return of_q, of_k | ((g < shown) & (text > 0)) if c.text_sees == "all" else of_k


def _live_windows(c: VideoCall, masks: HeadMasks) -> tuple[Tensor, Tensor]:
    """Of q and of k ``(B, T, heads)``, or ``(B, T)`` where all heads are alike, or a norm makes them so."""
    found = [(end - first, _live_under(mask, c)) for first, end, mask in masks.heads()]
    sides = []
    for i, of in enumerate((c.q.shape[3], c.k.shape[3])):
        heads = [(n * of // c.q.shape[3], live[i]) for n, live in found]
        if len(heads) == 1:
            sides.append(heads[0][1])
            continue
        each = torch.cat([x[..., None].expand(-1, -1, n) for n, x in heads], 2)
        sides.append(each.any(2) if c.norm is not None and c.norm.over == "all" else each)
    return sides[0], sides[1]


def _taking_part(x: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and which of its frames take part, as a norm's gradient takes them: with 0 in heads that do not."""
    if live is None or live.ndim == 2:
        return x, None if live is None else live.to(torch.int8)
    return torch.where(live[:, :, None, :, None], x, 0), None


def _frame_backward(
    c: VideoCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    from vdcore_kernels.frame_attention.backward import frame_backward
    from vdcore_kernels.tile_attention.backward import tile_backward

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
    given: dict[str, Any] = {"out": out, "lse": lse, "dout": dout, "dlse": dlse}
    given |= {"gradients": (dq, dk, gradients[2]), "text_gradients": filled_text}
    (tile_backward if isinstance(c.mask, HeadMasks) else frame_backward)(_problem(c), **given)
    if c.norm or c.rope:
        live = _live_windows(c, c.mask) if isinstance(c.mask, HeadMasks) else _live_frames(c)
        rows = (("q", c.q, dq, c.q_start), ("k", c.k, dk, 0))
        for (role, x, dy, start), dx, alive in zip(rows, gradients, live):
            keep = c.packed is None
            x, alive = _taking_part(x, alive)
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


def _why_not_tangents(c: VideoCall) -> str | None:
    return "its tangents know no GridMask" if isinstance(c.mask, HeadMasks) else why_not_tangents(c.q)


def frame_tangents(c: VideoCall, outputs: tuple[Tensor, ...], given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of out ``(B, rows, H, D)`` and lse ``(B, rows, H)``."""
    from vdcore_kernels.frame_attention import tangents

    (_, dq), (_, dk), (_, dv) = qkv_duals(c, given)
    moved, of_text = (dq, dk, dv), tangents.NO_TANGENTS
    if c.text is not None:
        x, y, (_, dv) = ((x, given.get(f"text_{name}")) for name, x in zip("qkv", c.text))
        (_, dq), (_, dk) = prepared(x, y, c.text_norm, None, 0, given, "text_")
        of_text = dq, dk, dv
    out, lse = outputs
    dout, dlse = empty_like(out), empty_like(lse)
    tangents.frame_tangents(_problem(c), out, lse, (moved, of_text), dout, dlse)
    return dout, dlse


FRAMES = Implementation(
    _frame, _frame_backward, _frame_why_not, tangents=frame_tangents, why_not_tangents=_why_not_tangents
)
