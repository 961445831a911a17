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


def _numbers(lengths: Tensor | None) -> list[int] | None:
    return None if lengths is None else lengths.flatten().tolist()


def _groups(c: FrameCall | CrossCall) -> Groups:
    B, T, S = c.q.shape[:3]
    lengths = c.lengths
    if isinstance(c, CrossCall):
        per_frame = _prompt_per_frame(c)
        if lengths is not None and per_frame:
            lengths = (lengths if lengths.ndim == 2 else lengths[:, None]).expand(B, T)
        return native().prompt_groups(B, T, S, c.k.shape[-3], per_frame, _numbers(lengths))
    text = 0 if c.text is None else c.text[0].shape[1]
    return native().frame_groups(
        *(mask_numbers(c.mask), B, T, c.k.shape[1], S, c.q_start, _numbers(lengths)),
        *(text, _numbers(c.text_lengths), c.text_sees == "all"),
    )


def _prompt_per_frame(c: FrameCall | CrossCall) -> bool:
    return isinstance(c, CrossCall) and (c.k.ndim == 5 or _cut_per_frame(c))


def _cut_per_frame(c: FrameCall | CrossCall) -> bool:
    """The frames of a sample share a prompt, each up to a length of its own."""
    return isinstance(c, CrossCall) and c.k.ndim == 4 and c.lengths is not None and c.lengths.ndim == 2


# ---- A call as two segments, the video and the text, which is a video of one frame ----


def _prompts(x: Tensor) -> Tensor:
    """Keys or values ``(B, L, G, D)`` or ``(B, T, L, G, D)`` as a video of the prompts, ``(B, 1 or T, L, G, D)``."""
    return x.unsqueeze(1) if x.ndim == 4 else x


def _as_read(c: FrameCall | CrossCall, x: Tensor) -> Tensor:
    """Keys or values as the kernel reads them: a prompt that is cut per frame lies there once for all frames."""
    return x.expand(-1, c.q.shape[1], -1, -1, -1) if _cut_per_frame(c) else x


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


def _dead_runs(c: FrameCall | CrossCall, groups: Groups, side: str, *, text: bool) -> list[tuple[int, int, int]]:
    """Runs ``(sample, begin, end)`` of tokens that take no part."""
    if side == "keys" and _cut_per_frame(c):
        assert c.lengths is not None
        L = c.k.shape[-3]
        return [(b, min(max(n, 0), L), L) for b, n in enumerate(c.lengths.amax(1).tolist())]
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
    q, k = c.q, _prompts(c.k) if isinstance(c, CrossCall) else c.k
    rope, q_start = (c.rope, c.q_start) if isinstance(c, FrameCall) else (None, 0)
    if c.norm is not None or rope is not None:
        q = _keep(q, _dead_runs(c, groups, "queries", text=False))
        k = _keep(k, _dead_runs(c, groups, "keys", text=False))
    video = NormRopeBefore(q, k, c.norm, rope, q_start)
    text = _text(c)
    if text is None or not isinstance(c, FrameCall):
        return video, None
    q, k = text[:2]
    if c.text_norm is not None:
        q = _keep(q, _dead_runs(c, groups, "queries", text=True))
        k = _keep(k, _dead_runs(c, groups, "keys", text=True))
    return video, NormRopeBefore(q, k, c.text_norm, None)


def _values(c: FrameCall | CrossCall) -> tuple[Tensor, Tensor | None]:
    text = _text(c)
    return _prompts(c.v) if isinstance(c, CrossCall) else c.v, None if text is None else text[2]


def _seen(c: FrameCall | CrossCall, part: NormRopeBefore, v: Tensor) -> QKV:
    q, k = part.forward()
    return q, _as_read(c, k), _as_read(c, v)


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
        [*_seen(c, part, v), o, s, mixed]
        for part, v, o, s, mixed in zip(before, _values(c), outs, lses, (spatial, None))
        if part is not None and v is not None
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
    inputs = [_seen(c, part, v) for part, v in zip(before, values) if part is not None and v is not None]
    packed = c.packed if isinstance(c, FrameCall) else None
    whole = None if packed is None else torch.empty(packed.shape, dtype=packed.dtype)
    # Frames that share a prompt: their shares are added up in float32.
    kv_dtype = torch.float32 if _cut_per_frame(c) else c.k.dtype
    gradients = [
        [torch.empty(x.shape, dtype=dtype) for x, dtype in zip(qkv, (c.q.dtype, kv_dtype, kv_dtype))] for qkv in inputs
    ]
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
    # Rows of the queries' gradient and a number for each, padded to the longest vector.
    floats = -(-groups.largest_component * (H // G) * (-(-D // 16) * 16 + 1) // 16) * 16
    buffers, parts = dq_buffers(groups.components * G, floats, threads)
    if buffers:
        workspace = torch.empty(buffers, floats)
    delta = torch.empty(B, H, lse.numel() // (B * H))
    native().frame_attention_backward(
        *(groups, _capsules(segments[0]), _capsules(segments[1]) if len(segments) > 1 else []),
        *(c.scale, capsule(delta), capsule(workspace), parts, threads),
    )
    if _cut_per_frame(c):
        gradients[0][1:] = [x.sum(1, keepdim=True).to(c.k.dtype) for x in gradients[0][1:]]
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
