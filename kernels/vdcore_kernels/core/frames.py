"""FrameMask inside kernels: a mask is four numbers, and every frame's partners are at most two runs of frames."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore_kernels.core.launch import Config, launch


def mask_numbers(mask: FrameMask, T: int, T_k: int, q_start: int) -> tuple[tuple[int, int, int, int], bool]:
    """``(past, future, chunk, sink)`` for kernels, -1 for no bound, and whether anything at all is hidden.

    Numbers beyond the video are cut down, so that products of two of them stay inside 32 bits.
    """
    frames = max(T_k, q_start + T, 1)
    chunk = min(mask.chunk, frames)
    chunks = -(-frames // chunk)
    past, future = (-1 if n is None or n >= chunks else n for n in (mask.past, mask.future))
    masked = past >= 0 or future >= 0
    return ((past, future, chunk, min(mask.sink, frames)) if masked else (-1, -1, frames, 0)), masked


@triton.jit
def visible_runs(q, valid, past, future, chunk, sink):
    """Key frames that query frames q see, of the first ``valid`` ones: [0, sink) and [begin, end)."""
    c = q // chunk
    end = tl.where(future < 0, valid, tl.minimum(valid, (c + future + 1) * chunk))
    begin = tl.where(past < 0, 0, tl.minimum(tl.maximum(c - past, 0) * chunk, end))
    return tl.minimum(sink, begin), begin, end


@triton.jit
def seeing_run(k, first, last, past, future, chunk, sink):
    """Query frames among [first, last) that see key frames k: one run [begin, end), empty where end <= begin."""
    c = k // chunk
    begin = tl.where(future < 0, first, tl.maximum(first, (c - future) * chunk))
    end = tl.where((past < 0) | (k < sink), last, tl.minimum(last, (c + past + 1) * chunk))
    return begin, end


@triton.jit
def load_length(p_len, i, most):
    """The i-th length: below 0 counts as 0, above ``most`` as ``most``."""
    return tl.minimum(tl.maximum(tl.load(p_len + i), 0), most).to(tl.int32)


@triton.jit
def valid_frames(p_len, i_b, T, T_k, q_start):
    """Of sample i_b: the first key frame that is invisible, and the first query frame (q_start + t) that is dead.

    Where no query frame is alive, no key frame is visible.
    """
    last = q_start + T
    valid = T_k + 0
    if p_len is not None:
        length = load_length(p_len, i_b, tl.maximum(T_k, last))
        last = tl.minimum(last, length)
        valid = tl.where(last > q_start, tl.minimum(valid, length), 0)
    return valid, last


@triton.jit(do_not_specialize=["frames"])
def live_frames_kernel(
    p_q,  # (B, T), int8: query frames that see anything
    p_k,  # (B, T_k), int8: key frames that anyone sees
    p_len,  # (B,), or None
    p_text,  # (B,): valid text tokens; None: all L
    frames,  # T, T_k, q_start, past, future, chunk, sink
    L,  # text tokens; 0: no text
    TEXT_SEES: tl.constexpr,  # text sees the video
    BT: tl.constexpr,
):
    T, T_k, q_start, past, future, chunk, sink = frames
    i_b = tl.program_id(0).to(tl.int64)
    valid, last = valid_frames(p_len, i_b, T, T_k, q_start)
    text = L + 0
    if p_text is not None:
        text = load_length(p_text, i_b, L)
    for i in range(0, T, BT):
        o = i + tl.arange(0, BT)
        low, begin, end = visible_runs(q_start + o, valid, past, future, chunk, sink)
        live = (q_start + o < last) & ((low > 0) | (begin < end) | (text > 0))
        tl.store(p_q + i_b * T + o, tl.where(live, 1, 0), mask=o < T)
    of_text = 0
    if TEXT_SEES:
        of_text = T_k
        if p_len is not None:
            of_text = load_length(p_len, i_b, T_k)
        of_text = tl.where(text > 0, of_text, 0)
    for i in range(0, T_k, BT):
        o = i + tl.arange(0, BT)
        first, past_last = seeing_run(o, q_start, last, past, future, chunk, sink)
        live = ((o < valid) & (first < past_last)) | (o < of_text)
        tl.store(p_k + i_b * T_k + o, tl.where(live, 1, 0), mask=o < T_k)


LIVE = Config("", 4, 1, "a few numbers a sample: the launch is all it costs")


def live_frames(
    q: Tensor,
    k: Tensor,
    *,
    mask: FrameMask,
    q_start: int,
    lengths: Tensor | None,
    text: int = 0,
    text_lengths: Tensor | None = None,
    text_sees: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Frames of q ``(B, T, ...)`` and of k ``(B, T_k, ...)`` that take part, ``(B, T)``; None where all do.

    Args:
        text: text tokens that the video sees, of which ``text_lengths`` ``(B,)`` are valid.
        text_sees: they see the video.
    """
    B, T, T_k = q.shape[0], q.shape[1], k.shape[1]
    numbers, masked = mask_numbers(mask, T, T_k, q_start)
    if not masked and lengths is None:
        return None, None
    live = tuple(torch.empty(B, n, dtype=torch.int8, device=q.device) for n in (T, T_k))
    launch(
        live_frames_kernel,
        B,
        q,
        LIVE,
        *(*live, lengths, text_lengths, (T, T_k, q_start, *numbers), text),
        TEXT_SEES=text_sees,
        BT=128,
    )
    return live
