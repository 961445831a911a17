"""Spatial and video attention on Hopper, forward: csrc/cuda/frame_attention.

Norm and RoPE take a pass of their own before, because the kernel reads every key many times.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from vdcore.grid_mask import HeadMasks
from vdcore.ops.call import mask_numbers
from vdcore.ops.choose import Implementation
from vdcore.ops.cuda import capability, int64, kernels, stream, why_not, why_not_mask, why_not_norm, why_not_rows
from vdcore.ops.native import capsule
from vdcore.ops.qk_norm_rope.cuda import normalized_rotated

if TYPE_CHECKING:
    from vdcore.ops.frame_attention import VideoCall

MAX_HEAD_DIM = 128
_CAPABILITY = (9, 0)  # wgmma is for this one alone


def _why_not_strides(**tensors: Tensor) -> str | None:
    """What a tensor map cannot hold: a step of 0, as an expanded tensor has it."""
    for name, x in tensors.items():
        if any(stride == 0 for stride, size in zip(x.stride(), x.shape) if size > 1):
            return f"it steps through memory, and {name} is expanded: strides {tuple(x.stride())}"
    return why_not_rows(**tensors)


def why_not_frames(c: VideoCall) -> str | None:
    if isinstance(c.mask, HeadMasks):
        return "it has no GridMask"
    reason = why_not(c.q) or why_not_mask(c.mask) or why_not_norm(c.norm) or why_not_norm(c.text_norm)
    if reason is not None:
        return reason
    if c.q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {c.q.shape[-1]}"
    if capability(c.q) not in (None, _CAPABILITY):
        return "it is for GPUs of compute capability 9.0"
    if max(c.k.shape[1], c.q_start + c.q.shape[1]) * c.q.shape[2] + c.rows >= 2**31 - 2**10:
        return "it counts the tokens of a sample in 32 bits"
    text = {} if c.text is None else dict(zip(("text_q", "text_k", "text_v"), (_as_frame(x) for x in c.text)))
    return _why_not_strides(q=c.q, k=c.k, v=c.v, **text)


def _as_frame(text: Tensor) -> Tensor:
    """Text ``(B, L, heads, D)`` as one frame."""
    return text.unsqueeze(1)


def run_forward(
    c: VideoCall,
    out: Tensor,
    lse: Tensor | None,
    *,
    spatial: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Fills out and lse; with a gate ``out = gate * result + (1 - gate) * out``, and ``spatial`` gets the result."""
    q, k = normalized_rotated(c.q, c.k, c.norm, c.rope, c.q_start)
    text: tuple[Tensor, ...] = ()
    if c.text is not None:
        text_q, text_k, text_v = (_as_frame(x) for x in c.text)
        text = (*normalized_rotated(text_q, text_k, c.text_norm), text_v)
    if c.scale < 0:
        q, text = -q, (-text[0], *text[1:]) if text else text
    # Not quite 0: a maximum of -inf is multiplied by it.
    exponent = max(abs(c.scale), 1e-30) / math.log(2)
    video = q.shape[1] * q.shape[2]
    kernels().frame_attention_forward(
        op=c.op,
        video=[capsule(x) for x in (q, k, c.v)],
        text=[capsule(x) for x in text],
        out=capsule(out),
        lse=capsule(lse),
        lengths=int64(c.lengths),
        text_lengths=int64(c.text_lengths),
        video_row=c.rows - video if c.text_first else 0,
        text_row=0 if c.text_first else video,
        mask=mask_numbers(c.frame_mask),
        q_start=c.q_start,
        text_sees_video=c.text_sees == "all",
        exponent=exponent,
        gate=capsule(gate),
        ungated=capsule(spatial),
        stream=stream(q),
    )


def _forward(c: VideoCall) -> tuple[Tensor | None, ...]:
    out, lse = c.empty_outputs()
    run_forward(c, out, lse)
    return out, lse


FRAMES = Implementation(_forward, None, why_not_frames)
