"""Spatial, video and cross attention on the CPU engine: csrc/cpu/frame_attention.cpp.

Norm and rope take a pass of their own before, because the kernel reads every key many times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdcore.backends._native import native
from vdcore.backends.base import Gradients, Implementation
from vdcore.backends.call import QKV, CrossCall, FrameCall, mask_numbers
from vdcore.backends.cpu._arguments import capsule, unit_stride, why_not
from vdcore.backends.cpu._norm_rope import NormRopeBefore

# Threads share out components and heads. Where these are fewer, each is cut into parts of its keys; a part has a query
# gradient of its own, and where those would take more than this, backward takes seven products instead of five. Not a
# matter of the number of threads: the same bits on every machine.
_FEWEST_ITEMS = 8
_MOST_WORKSPACE = 256 * 2**20


def dq_buffers(items: int, floats: int, threads: int) -> tuple[int, int]:
    """In how many buffers backward adds up gradients of queries, and in how many parts of the keys; 0: in none.

    Args:
        items: components times key/value heads.
        floats: of one buffer.
    """
    parts = max(-(-_FEWEST_ITEMS // max(items, 1)), 1)
    if parts == 1:
        return min(threads, items), 1
    return (items * parts if items * parts * floats * 4 <= _MOST_WORKSPACE else 0), parts


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


def _before(c: FrameCall | CrossCall, groups: Groups) -> tuple[NormRopeBefore, NormRopeBefore | None]:
    """What stands before the scores: of the video and of the text."""
    q, k = c.q, c.k.unsqueeze(1) if c.k.ndim == 4 else c.k
    rope, q_start = (c.rope, c.q_start) if isinstance(c, FrameCall) else (None, 0)
    if c.norm is not None or rope is not None:
        q = _keep(q, _dead_runs(groups, "queries", text=False))
        k = _keep(k, _dead_runs(groups, "keys", text=False))
    video = NormRopeBefore(q, k, c.norm, rope, q_start)
    text = _text(c)
    if text is None or not isinstance(c, FrameCall):
        return video, None
    q, k = text[:2]
    if c.text_norm is not None:
        q = _keep(q, _dead_runs(groups, "queries", text=True))
        k = _keep(k, _dead_runs(groups, "keys", text=True))
    return video, NormRopeBefore(q, k, c.text_norm, None)


def _values(c: FrameCall | CrossCall) -> tuple[Tensor, Tensor | None]:
    text = _text(c)
    return c.v.unsqueeze(1) if c.v.ndim == 4 else c.v, None if text is None else text[2]


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
    before, outs, lses = _before(c, groups), _joint(c, out), _joint(c, lse)
    segments = [
        [*part.forward(), v, o, s, mixed]
        for part, v, o, s, mixed in zip(before, _values(c), outs, lses, (spatial, None))
        if part is not None
    ]
    native().frame_attention_forward(
        *(groups, _capsules(segments[0]), _capsules(segments[1]) if len(segments) > 1 else []),
        *(c.scale, capsule(gate), torch.get_num_threads()),
    )


def run_backward(
    c: FrameCall | CrossCall,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    wanted: frozenset[str],
) -> Gradients:
    """Gradients by the names of ``c.TENSORS``."""
    groups = _groups(c)
    before, values = _before(c, groups), _values(c)
    inputs = [(*part.forward(), v) for part, v in zip(before, values) if part is not None and v is not None]
    packed = c.packed if isinstance(c, FrameCall) else None
    whole = None if packed is None else torch.empty(packed.shape, dtype=packed.dtype)
    gradients = [[torch.empty(x.shape, dtype=x.dtype) for x in qkv] for qkv in inputs]
    if whole is not None:
        gradients[0] = list(whole.unbind(3))

    out, lse = outputs
    dout, dlse = grads
    dout = torch.zeros_like(out) if dout is None else dout
    joint = [_joint(c, x if x is None else unit_stride(x)) for x in (out, lse, dout, dlse)]
    segments = [
        [*qkv, joint[0][i], joint[1][i], None, joint[2][i], joint[3][i], *gradients[i]] for i, qkv in enumerate(inputs)
    ]
    B, _, _, H, D = c.q.shape
    G = inputs[0][1].shape[3]
    threads, workspace = torch.get_num_threads(), None
    floats = groups.largest_component * (H // G) * -(-D // 16) * 16
    buffers, parts = dq_buffers(groups.components * G, floats, threads)
    if buffers:
        workspace = torch.empty(buffers, floats)
    delta = torch.empty(B, H, lse.numel() // (B * H))
    native().frame_attention_backward(
        *(groups, _capsules(segments[0]), _capsules(segments[1]) if len(segments) > 1 else []),
        *(c.scale, capsule(delta), capsule(workspace), parts, threads),
    )
    found: Gradients = {}
    for prefix, part, (dq, dk, dv) in zip(("", "text_"), (x for x in before if x is not None), gradients):
        mine = frozenset(name.removeprefix(prefix) for name in wanted if name.startswith(prefix))
        found |= {prefix + name: x for name, x in part.backward(dq, dk, mine).items()} | {f"{prefix}v": dv}
    return _by_name(c, whole, found)


def _by_name(c: FrameCall | CrossCall, whole: Tensor | None, found: Gradients) -> Gradients:
    """Gradients in the shapes of the call's tensors."""
    if whole is not None:
        for part, name in zip(whole.unbind(3), "qkv"):
            if found[name].data_ptr() != part.data_ptr():
                part.copy_(found[name])
        found = {name: x for name, x in found.items() if name not in "kv"} | {"q": whole}
    prompts = ("k", "v") if isinstance(c, CrossCall) and c.k.ndim == 4 else ("text_q", "text_k", "text_v")
    return found | {name: found[name].squeeze(1) for name in prompts if name in found}


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
