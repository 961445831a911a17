"""Spatial and video attention on the CPU engine: csrc/cpu/frame_attention.

Norm and rope take a pass of their own before, because the kernel reads every key many times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcore.ops.call import Triple, mask_numbers
from vdcore.ops.check import unit_stride
from vdcore.ops.choose import Gradients, Implementation
from vdcore.ops.native import capsule, native, why_not
from vdcore.ops.qk_norm_rope.cpu import NormRopeBefore

if TYPE_CHECKING:
    from vdcore.ops.frame_attention import VideoCall

Groups = Any  # of the native module: which query tokens see which key tokens
Joint = tuple[Tensor | None, ...]  # views of a joint sequence, one for each segment


@dataclass
class Segment:
    """A part of a joint sequence: the video, or the text, which is a video of one frame.

    Args:
        before: q and k ``(B, T, S, heads, D)`` on their way to the scores.
        v: ``(B, T_k, S, G, D)``.
        repeat: frames that keys and values of one frame stand for.
    """

    before: NormRopeBefore
    v: Tensor
    repeat: int = 1

    def seen(self) -> Triple:
        """q, k, v as the scores see them."""
        q, k = self.before.forward()
        if self.repeat == 1:
            return q, k, self.v
        k, v = (x.expand(-1, self.repeat, -1, -1, -1) for x in (k, self.v))
        return q, k, v


def numbers(lengths: Tensor | None) -> list[int] | None:
    return None if lengths is None else lengths.flatten().tolist()


def dead_runs(groups: Groups, side: str, *, text: bool = False) -> list[tuple[int, int, int]]:
    """Runs ``(sample, begin, end)`` of tokens that take no part."""
    return [(b, begin, end) for b, (t, begin, end), runs in getattr(groups, side) if not runs and t == text]


def keep(x: Tensor, dead: list[tuple[int, int, int]]) -> Tensor:
    """x with 0 in the rows that take no part: a weight that all rows share would collect ``0 * NaN`` from them."""
    if not dead:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    for b, begin, end in dead:
        x.flatten(1, 2)[b, begin:end] = 0
    return x


def attend(
    groups: Groups,
    segments: list[Segment],
    outs: Joint,
    lses: Joint,
    scale: float,
    *,
    mixed: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Fills outs and lses; with a gate ``out = gate * result + (1 - gate) * out``, and ``mixed`` gets the result."""
    video, *text = (
        [capsule(x) for x in (*segment.seen(), out, lse, mixed)] for segment, out, lse in zip(segments, outs, lses)
    )
    native().frame_attention_forward(
        groups=groups,
        video=video,
        text=text[0] if text else [],
        scale=scale,
        gate=capsule(gate),
        threads=torch.get_num_threads(),
    )


def attend_backward(
    groups: Groups, segments: list[Segment], joint: list[Joint], gradients: list[Any], scale: float
) -> None:
    """Fills gradients of q, k and v as the scores see them, three for each segment; joint: out, lse, dout, dlse."""
    out, lse, dout, dlse = joint
    seen = [segment.seen() for segment in segments]
    video, *text = (
        [capsule(x) for x in (*qkv, out[i], lse[i], None, dout[i], dlse[i], *gradients[i])]
        for i, qkv in enumerate(seen)
    )
    native().frame_attention_backward(
        groups=groups, video=video, text=text[0] if text else [], scale=scale, threads=torch.get_num_threads()
    )


# ---- Spatial and video attention: the video, and its text ----


def groups_of(c: VideoCall) -> Groups:
    B, T, S = c.q.shape[:3]
    text = 0 if c.text is None else c.text[0].shape[1]
    return native().frame_groups(
        mask=mask_numbers(c.frame_mask),
        batch=B,
        queries=T,
        keys=c.k.shape[1],
        tokens=S,
        q_start=c.q_start,
        lengths=numbers(c.lengths),
        text=text,
        text_lengths=numbers(c.text_lengths),
        text_sees_video=c.text_sees == "all",
    )


def _segments(c: VideoCall, groups: Groups) -> list[Segment]:
    def kept(x: Tensor, side: str, text: bool) -> Tensor:
        return keep(x, dead_runs(groups, side, text=text))

    return segments_of(c, kept)


def segments_of(c: VideoCall, kept: Callable[[Tensor, str, bool], Tensor]) -> list[Segment]:
    """The call's segments; ``kept(x, side, text)``: with 0 in the rows that take no part, where a weight is shared."""
    q, k = c.q, c.k
    if c.norm is not None or c.rope is not None:
        q, k = kept(q, "queries", False), kept(k, "keys", False)
    segments = [Segment(NormRopeBefore(q, k, c.norm, c.rope, c.q_start), c.v)]
    if c.text is not None:
        q, k, v = _as_video(c.text)
        if c.text_norm is not None:
            q, k = kept(q, "queries", True), kept(k, "keys", True)
        segments.append(Segment(NormRopeBefore(q, k, c.text_norm, None), v))
    return segments


def _as_video(text: Triple) -> Triple:
    """Text ``(B, L, heads, D)`` as a video of one frame."""
    q, k, v = (x.unsqueeze(1) for x in text)
    return q, k, v


def joint(c: VideoCall, x: Tensor | None) -> Joint:
    """Views ``(B, T, S, ...)`` and ``(B, 1, L, ...)`` of a joint sequence ``(B, rows, ...)``: out, lse, gradients."""
    if x is None:
        return None, None
    T, S = c.q.shape[1:3]
    if c.text is None:
        return x.unflatten(1, (T, S)), None
    L = c.text[0].shape[1]
    text, video = x.split([L, T * S], 1) if c.text_first else reversed(x.split([T * S, L], 1))
    return video.unflatten(1, (T, S)), text.unsqueeze(1)


def run_forward(
    c: VideoCall, out: Tensor, lse: Tensor | None, *, spatial: Tensor | None = None, gate: Tensor | None = None
) -> None:
    """Fills out and lse; with a gate ``out = gate * result + (1 - gate) * out``, and ``spatial`` gets the result."""
    groups = groups_of(c)
    attend(groups, _segments(c, groups), joint(c, out), joint(c, lse), c.scale, mixed=spatial, gate=gate)


def run_backward(
    c: VideoCall, outputs: tuple[Tensor, Tensor], grads: tuple[Tensor | None, ...], wanted: frozenset[str]
) -> Gradients:
    """Gradients by the names of ``c.NAMES``."""
    groups = groups_of(c)
    segments = _segments(c, groups)

    def fill(rows: list[Joint], filled: list[Any]) -> None:
        attend_backward(groups, segments, rows, filled, c.scale)

    return gradients_of(c, segments, outputs, grads, wanted, fill)


def gradients_of(
    c: VideoCall,
    segments: list[Segment],
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor | None, ...],
    wanted: frozenset[str],
    fill: Callable[[list[Joint], list[Any]], None],
) -> Gradients:
    """``fill(rows, filled)``: those of q, k and v as the scores see them, of out, lse, dout, dlse; for each segment."""
    whole = None if c.packed is None else torch.empty(c.packed.shape, dtype=c.packed.dtype)
    gradients = [[torch.empty(x.shape, dtype=x.dtype) for x in qkv] for qkv in ((c.q, c.k, c.v), c.text) if qkv]
    if whole is not None:
        gradients[0] = list(whole.unbind(3))
    (out, lse), (dout, dlse) = outputs, grads
    dout = torch.zeros_like(out) if dout is None else dout
    rows = [joint(c, x if x is None else unit_stride(x)) for x in (out, lse, dout, dlse)]
    filled = [gradients[0], *([x.unsqueeze(1) for x in text] for text in gradients[1:])]
    fill(rows, filled)
    found: Gradients = {}
    for prefix, segment, (dq, dk, dv) in zip(("", "text_"), segments, filled):
        mine = frozenset(name.removeprefix(prefix) for name in wanted if name.startswith(prefix))
        found |= {prefix + name: x for name, x in segment.before.backward(dq, dk, mine).items()} | {f"{prefix}v": dv}
    if whole is not None:
        for part, name in zip(whole.unbind(3), "qkv"):
            if found[name].data_ptr() != part.data_ptr():
                part.copy_(found[name])
        found = {name: x for name, x in found.items() if name not in "kv"} | {"q": whole}
    return found | {name: found[name].squeeze(1) for name in ("text_q", "text_k", "text_v") if name in found}


def _forward(c: VideoCall) -> tuple[Tensor | None, ...]:
    out, lse = c.empty_outputs()
    run_forward(c, out, lse)
    return out, lse


def _why_not(c: VideoCall) -> str | None:
    return why_not(c.q, c.q.shape[-1])


FRAMES = Implementation(_forward, run_backward, _why_not)
