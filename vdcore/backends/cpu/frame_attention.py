"""Spatial, video and cross attention on the CPU engine: csrc/cpu/frame_attention.cpp.

Norm and rope take a pass of their own before, because the kernel reads every key many times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdcore.backends._native import native
from vdcore.backends.base import Gradients, Implementation, recording
from vdcore.backends.call import QKV, CrossCall, FrameCall, mask_numbers
from vdcore.backends.cpu._arguments import capsule, why_not

# Backward takes five products where threads share out components and heads, and seven where these are too few to share
# out. Not a matter of the number of threads: the same bits on every machine.
_FEWEST_COMPONENTS = 8

Groups = Any  # of the native module: which query tokens see which key tokens
Segment = list[Tensor | None]


def _groups(c: FrameCall | CrossCall) -> Groups:
    B, T, S = c.q.shape[:3]
    lengths = None if c.lengths is None else c.lengths.flatten().tolist()
    if isinstance(c, CrossCall):
        return native().prompt_groups(B, T, S, c.k.shape[-3], c.k.ndim == 5, lengths)
    text = 0 if c.text is None else c.text[0].shape[1]
    text_lengths = None if c.text_lengths is None else c.text_lengths.tolist()
    return native().frame_groups(
        *(mask_numbers(c.mask), B, T, c.k.shape[1], S, c.q_start, lengths),
        *(text, text_lengths, c.text_sees == "all"),
    )


# ---- A call as two segments, the video and the text, which is a video of one frame ----


def _joint(c: FrameCall | CrossCall, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Views ``(B, T, S, ...)`` and ``(B, 1, L, ...)`` of a joint sequence ``(B, rows, ...)``: out, lse, gradients."""
    if x is None or x.numel() == 0:
        return None, None
    if isinstance(c, CrossCall):
        return x, None
    T, S = c.q.shape[1:3]
    if c.text is None:
        return x.unflatten(1, (T, S)), None
    L = c.text[0].shape[1]
    text, video = x.split([L, T * S], 1) if c.text_first else reversed(x.split([T * S, L], 1))
    return video.unflatten(1, (T, S)), text.unsqueeze(1)


def _text(c: FrameCall | CrossCall) -> QKV | None:
    if isinstance(c, CrossCall) or c.text is None:
        return None
    q, k, v = (x.unsqueeze(1) for x in c.text)
    return q, k, v


def _dead_runs(groups: Groups, side: str, *, text: bool) -> list[tuple[int, int, int]]:
    """Runs ``(sample, begin, end)`` of tokens that take no part."""
    return [(b, begin, end) for b, (t, begin, end), runs in getattr(groups, side) if not runs and t == text]


def _keep(x: Tensor, dead: list[tuple[int, int, int]]) -> Tensor:
    """x with 0 in the rows that take no part: a weight that all rows share would collect ``0 * NaN`` from them."""
    if not dead:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    for b, begin, end in dead:
        x.flatten(1, 2)[b, begin:end] = 0
    return x


def _normed(c: FrameCall | CrossCall, groups: Groups) -> tuple[QKV, QKV | None]:
    """q, k, v as the scores see them, in q's dtype: of the video and of the text."""
    k, v = (x.unsqueeze(1) if x.ndim == 4 else x for x in (c.k, c.v))
    q, rope = c.q, c.rope if isinstance(c, FrameCall) else None
    if c.norm is not None or rope is not None:
        q = _keep(q, _dead_runs(groups, "queries", text=False))
        k = _keep(k, _dead_runs(groups, "keys", text=False))
    if c.norm is not None:
        q, k = c.norm.q(q), c.norm.k(k)
    if rope is not None and isinstance(c, FrameCall):
        q, k = rope.rotate(q, c.q_start), rope.rotate(k)
    text = _text(c)
    if text is not None and isinstance(c, FrameCall) and c.text_norm is not None:
        text_q = c.text_norm.q(_keep(text[0], _dead_runs(groups, "queries", text=True)))
        text_k = c.text_norm.k(_keep(text[1], _dead_runs(groups, "keys", text=True)))
        text = text_q.to(v.dtype), text_k.to(v.dtype), text[2]
    return (q.to(v.dtype), k.to(v.dtype), v), text


def _capsules(segment: Segment) -> list[object]:
    return [] if segment[0] is None else [capsule(x) for x in segment]


def run_forward(
    c: FrameCall | CrossCall,
    out: Tensor,
    lse: Tensor | None,
    *,
    spatial: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Fills out and lse; with a gate ``out = gate * result + (1 - gate) * out``, and ``spatial`` gets the result."""
    groups = _groups(c)
    with torch.no_grad():
        video, text = _normed(c, groups)
    outs, lses = _joint(c, out), _joint(c, lse)
    segments = [[*video, outs[0], lses[0], spatial], [*(text or (None,)), outs[1], lses[1], None]]
    native().frame_attention_forward(
        *(groups, *map(_capsules, segments), c.scale, capsule(gate), torch.get_num_threads())
    )


def run_backward(
    c: FrameCall | CrossCall,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    wanted: frozenset[str],
) -> Gradients:
    """Gradients by the names of ``c.TENSORS``."""
    groups = _groups(c)
    names = [name.rstrip("?") for name in c.TENSORS]
    leaves = {name: x for name, x in zip(names, c.tensors()) if name in wanted and x is not None}
    before = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    through = c.norm is not None or (isinstance(c, FrameCall) and (c.rope is not None or c.text_norm is not None))
    if through:
        given = tuple(before.get(name, x) for name, x in zip(names, c.tensors()))
        with recording():
            video, text = _normed(c.build(c.op, c.grad, given, c.attributes()), groups)  # type: ignore[arg-type]
    else:
        video, text = _normed(c, groups)

    packed = c.packed if isinstance(c, FrameCall) else None
    whole = None if packed is None else torch.empty(packed.shape, dtype=packed.dtype)
    gradients = [
        list(whole.unbind(3)) if whole is not None else [torch.empty(x.shape, dtype=x.dtype) for x in video],
        [torch.empty(x.shape, dtype=x.dtype) for x in text or ()],
    ]
    out, lse = outputs
    dout, dlse = grads
    dout = torch.zeros_like(out) if dout is None else dout
    dout, dlse = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (dout, dlse))
    joint = [_joint(c, x) for x in (out, lse, dout, dlse)]
    segments = [
        [*qkv, joint[0][i], joint[1][i], None, joint[2][i], joint[3][i], *gradients[i]]
        for i, qkv in enumerate((video, text))
        if qkv is not None
    ]
    B, H, D = c.q.shape[0], c.q.shape[3], c.q.shape[4]
    G = video[1].shape[3]
    threads, workspace = torch.get_num_threads(), None
    if groups.components * G >= _FEWEST_COMPONENTS:
        workers = min(threads, groups.components * G)
        workspace = torch.empty(workers, groups.largest_component * (H // G) * -(-D // 16) * 16)
    delta = torch.empty(B, H, lse.numel() // (B * H))
    native().frame_attention_backward(
        *(groups, _capsules(segments[0]), _capsules(segments[1]) if text is not None else []),
        *(c.scale, capsule(delta), capsule(workspace), threads),
    )
    if not through:
        return _by_name(c, whole, gradients)
    pairs = [(x, dx) for x, dx in zip((*video, *(text or ())), (*gradients[0], *gradients[1])) if x.requires_grad]
    with recording():
        found = torch.autograd.grad(
            [x for x, _ in pairs], list(before.values()), [dx for _, dx in pairs], allow_unused=True
        )
    return {
        name: torch.zeros(x.shape, dtype=x.dtype) if dx is None else dx.contiguous()
        for (name, x), dx in zip(before.items(), found)
    }


def _by_name(c: FrameCall | CrossCall, whole: Tensor | None, gradients: list[list[Tensor]]) -> Gradients:
    found = {"q": whole} if whole is not None else dict(zip("qkv", gradients[0]))
    if isinstance(c, CrossCall) and c.k.ndim == 4:
        found |= {"k": found["k"].squeeze(1), "v": found["v"].squeeze(1)}
    return found | {name: x.squeeze(1) for name, x in zip(("text_q", "text_k", "text_v"), gradients[1])}


def _forward(c: FrameCall | CrossCall) -> tuple[Tensor, ...]:
    out, lse = c.empty_outputs()
    run_forward(c, out, lse if c.lse else None)
    return out, lse


def _backward(
    c: FrameCall | CrossCall, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    out, lse = outputs
    dout, dlse = grads
    return run_backward(c, (out, lse), (dout, dlse), wanted)


def _why_not(c: FrameCall | CrossCall) -> str | None:
    return why_not(c.q.device.type, c.q.dtype, c.q.shape[-1])


_attention = Implementation(_forward, _backward, _why_not)

OPERATORS = dict.fromkeys(("spatial_attention", "video_attention", "cross_attention"), _attention)
