"""Video attention on the CPU engine under masks of a grid: csrc/cpu/tile_attention; of frames alone: cpu.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.grid_mask import GridMask, HeadMasks
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.frame_attention import cpu
from vdcore.ops.frame_attention.cpu import Joint, Segment, gradients_of, joint, numbers, segments_of
from vdcore.ops.native import capsule, native

if TYPE_CHECKING:
    from vdcore.ops.frame_attention import VideoCall

Plan = Any  # of the native module: which tokens see which


def _windows(heads: int, mask: GridMask, T: int, T_k: int, q_start: int) -> tuple[Any, ...]:
    runs = [list(runs) for runs in mask.frame_runs(T, T_k, q_start)]
    most = T_k + 1  # as good as any number beyond
    steps = [[(min(d, 2**31), r) for d, r in steps] for steps in (mask.row_steps, mask.column_steps)]
    clean = min(mask.frames.clean, 2**31)
    return heads, list(mask.tile), mask.border == "shift", min(mask.sink, most), clean, runs, *steps


def plan_of(c: VideoCall, masks: HeadMasks) -> Plan:
    B, T = c.q.shape[:2]
    T_k = c.k.shape[1]
    return native().windows_plan(
        batch=B,
        queries=T,
        keys=T_k,
        rows=masks.grid[0],
        columns=masks.grid[1],
        q_start=c.q_start,
        groups=[_windows(heads, mask, T, T_k, c.q_start) for heads, mask in masks.groups],
        lengths=numbers(c.lengths),
        text=0 if c.text is None else c.text[0].shape[1],
        text_lengths=numbers(c.text_lengths),
        text_sees_video=c.text_sees == "all",
    )


class _Live:
    """Which rows take part, by sample, frame and head: whatever its row and column, a token sees its own place."""

    def __init__(self, c: VideoCall, masks: HeadMasks) -> None:
        self.c, self.masks = c, masks

    def __call__(self, x: Tensor, side: str, text: bool) -> Tensor:
        """x with 0 in rows that take no part: a weight that all rows share would collect ``0 * NaN`` from them."""
        live = self.text(x) if text else self.video(x, side)
        if live.all():
            return x
        return torch.where(
            live[:, :, None, :, None] if not text else live[:, None, :, None, None], x, torch.zeros_like(x)
        )

    def text(self, x: Tensor) -> Tensor:
        """``(B, L)``; x ``(B, 1, L, heads, D)``."""
        L, valid = x.shape[2], numbers(self.c.text_lengths)
        return torch.tensor([[i < n for i in range(L)] for n in valid or [L] * len(x)])

    def video(self, x: Tensor, side: str) -> Tensor:
        """``(B, frames, heads)``"""
        c, heads = self.c, x.shape[3]
        (B, T), T_k, H = c.q.shape[:2], c.k.shape[1], c.q.shape[3]
        most = max(T_k, c.q_start + T)
        lengths = [min(max(n, 0), most) for n in numbers(c.lengths) or [most] * B]
        words = [0] * B
        if c.text is not None:
            L = c.text[0].shape[1]
            words = [min(max(n, 0), L) for n in numbers(c.text_lengths) or [L] * B]
        live = torch.zeros(B, x.shape[1], heads, dtype=torch.bool)
        for first, end, mask in self.masks.heads():
            mine = slice(first * heads // H, end * heads // H)
            runs = mask.frame_runs(T, T_k, c.q_start)
            for b, n in enumerate(lengths):
                alive = min(max(n - c.q_start, 0), T)
                if words[b] and side == "queries":
                    live[b, :alive] = True
                if words[b] and side == "keys" and c.text_sees == "all":
                    live[b, : min(n, T_k)] = True
                for t in range(alive):
                    cut = [(begin, min(stop, n)) for begin, stop in runs[t] if begin < n]
                    if cut and side == "queries":
                        live[b, t, mine] = True
                    for begin, stop in cut if side == "keys" else ():
                        live[b, begin:stop, mine] = True
        if c.norm is not None and c.norm.over == "all":  # one head's values reach the others through it
            live = live.any(-1, keepdim=True).expand_as(live)
        return live


def attend(plan: Plan, segments: list[Segment], outs: Joint, lses: Joint, scale: float) -> None:
    """Fills outs and lses."""
    video, *text = ([capsule(x) for x in (*s.seen(), out, lse)] for s, out, lse in zip(segments, outs, lses))
    native().tile_attention_forward(
        plan=plan, video=video, text=text[0] if text else [], scale=scale, threads=torch.get_num_threads()
    )


def attend_backward(plan: Plan, segments: list[Segment], rows: list[Joint], filled: list[Any], scale: float) -> None:
    """Fills gradients of q, k and v as the scores see them; rows: out, lse, dout, dlse, each by segment."""
    out, lse, dout, dlse = rows
    seen = [segment.seen() for segment in segments]
    video, *text = (
        [capsule(x) for x in (*qkv, out[i], lse[i], dout[i], dlse[i], *filled[i])] for i, qkv in enumerate(seen)
    )
    q = seen[0][0]
    native().tile_attention_backward(
        plan=plan,
        video=video,
        text=text[0] if text else [],
        scale=scale,
        delta=capsule(torch.empty(q.shape[0], q.shape[3], sum(x.shape[1] * x.shape[2] for x, _, _ in seen))),
        threads=torch.get_num_threads(),
    )


def _forward(c: VideoCall) -> tuple[Tensor | None, ...]:
    if not isinstance(c.mask, HeadMasks):
        return cpu.FRAMES.forward(c)
    out, lse = c.empty_outputs()
    attend(plan_of(c, c.mask), segments_of(c, _Live(c, c.mask)), joint(c, out), joint(c, lse), c.scale)
    return out, lse


def _backward(
    c: VideoCall, outputs: tuple[Tensor, Tensor], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    if not isinstance(c.mask, HeadMasks):
        return cpu.run_backward(c, outputs, grads, wanted)
    plan, segments = plan_of(c, c.mask), segments_of(c, _Live(c, c.mask))

    def fill(rows: list[Joint], filled: list[Any]) -> None:
        attend_backward(plan, segments, rows, filled, c.scale)

    return gradients_of(c, segments, outputs, grads, wanted, fill)


FRAMES = Implementation(_forward, _backward, cpu.FRAMES.why_not)
