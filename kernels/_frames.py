"""FrameMask inside kernels: a mask is four numbers, and every frame's partners are at most two runs of frames."""

from __future__ import annotations

import triton
import triton.language as tl

from vdcore.mask import FrameMask


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
def valid_frames(p_len, i_b, T, T_k, q_start):
    """Of sample i_b: the first key frame that is invisible, and the first query frame (q_start + t) that is dead.

    Where no query frame is alive, no key frame is visible.
    """
    last = q_start + T
    valid = T_k + 0
    if p_len is not None:
        length = tl.load(p_len + i_b).to(tl.int32)
        last = tl.minimum(last, length)
        valid = tl.where(last > q_start, tl.minimum(valid, length), 0)
    return valid, last
