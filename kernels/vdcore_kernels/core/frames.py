"""Frames inside kernels: FrameMask as four numbers, and sequences of frames, which temporal attention's kernels share.

A mask lets every frame see, and be seen by, at most two runs of frames. A sequence is one position and key/value head
of a sample with all its frames; a program holds several, as a batch of small matrices in registers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore_kernels.core.tile import (
    affine,
    center,
    load_affine,
    load_angles,
    load_rows,
    materialize_before_dot,
    rotate,
    scale,
    standardize,
    store_rows,
    to,
)


class Frames(NamedTuple):
    """How many frames q and k have, the key frame of the first query frame, and a mask's numbers, -1 for no bound.

    Args:
        group: query frames, counted from key frame 0 on, that all see the same.
        clean: frames of the clean half of teacher forcing; None: another mask.
        shots: (frames, 2), int32: a frame's shot's first frame, -1 for none, and where the shot that begins with it
            ends, 0 where none does; None: there are no shots.
    """

    T: Any
    T_k: Any
    q_start: Any
    past: Any
    future: Any
    chunk: Any
    sink: Any
    group: Any
    clean: Any = None
    shots: Any = None


@lru_cache(maxsize=1024)
def frame_bounds(
    mask: FrameMask, T: int, T_k: int, q_start: int, device: torch.device | None = None
) -> tuple[Frames, bool]:
    """Frames and mask for kernels, and whether anything at all is hidden.

    Numbers beyond the video are cut down, so that products of two of them stay inside 32 bits. ``device``: the
    kernels'; where it is None the result is for the host, and holds no table of shots.
    """
    frames = mask.clean or max(T_k, q_start + T, 1)
    chunk = min(mask.chunk, frames)
    chunks = -(-frames // chunk)
    past, future = (-1 if n is None or n >= chunks else n for n in (mask.past, mask.future))
    if mask.clean:
        group = math.gcd(chunk, mask.clean)
        return Frames(T, T_k, q_start, past, -1, chunk, 0, group, mask.clean), True
    if past < 0 and future < 0:
        return Frames(T, T_k, q_start, -1, -1, frames, 0, frames), False
    shots = tuple(shot for shot in mask.shots if shot < frames) if past >= 0 else ()
    table = _shot_table(shots, frames, device) if shots and device is not None else None
    sink, group = min(mask.sink, frames), math.gcd(chunk, *shots)
    return Frames(T, T_k, q_start, past, future, chunk, sink, group, None, table), True


@lru_cache(maxsize=64)
def _shot_table(shots: tuple[int, ...], frames: int, device: torch.device) -> Tensor:
    first, end = torch.full((frames,), -1), torch.zeros(frames, dtype=torch.int64)
    for shot, after in zip(shots, (*shots[1:], frames)):
        first[shot:after], end[shot] = shot, after
    return torch.stack((first, end), 1).to(torch.int32).to(device)


@triton.jit
def _teacher_forcing_runs(q, valid, frames):
    """As visible_runs: a clean frame sees [low, low_end) alone, a noisy one its own chunk in [begin, end)."""
    noisy = q >= frames.clean
    frame = q - tl.where(noisy, frames.clean, 0)
    c = frame // frames.chunk
    own = c * frames.chunk
    after = tl.minimum(own + frames.chunk, frames.clean)
    low = tl.where(frames.past < 0, 0, tl.maximum(c - frames.past, 0) * frames.chunk)
    low_end = tl.minimum(tl.where(noisy, own, after), valid)
    low = tl.minimum(low, low_end)
    begin = tl.where(noisy, tl.minimum(frames.clean + own, valid), low_end)
    end = tl.where(noisy, tl.minimum(frames.clean + after, valid), low_end)
    return low, low_end, begin, end


@triton.jit
def _shot_of(q, column, frames):
    known = q < tl.maximum(frames.T_k, frames.q_start + frames.T)
    return tl.load(frames.shots + 2 * q + column, mask=known, other=-1)


@triton.jit
def visible_runs(q, valid, frames):
    """Key frames that query frames q see, of the first ``valid`` ones: [low, low_end) and, after it, [begin, end)."""
    if frames.clean is not None:
        return _teacher_forcing_runs(q, valid, frames)
    else:
        c = q // frames.chunk
        end = tl.where(frames.future < 0, valid, tl.minimum(valid, (c + frames.future + 1) * frames.chunk))
        begin = tl.where(frames.past < 0, 0, tl.minimum(tl.maximum(c - frames.past, 0) * frames.chunk, end))
        if frames.shots is not None:
            shot = _shot_of(q, 0, frames)
            kept = (shot >= 0) & (shot < begin)
            return tl.where(kept, shot, 0), tl.where(kept, shot + 1, 0), begin, end
        else:
            return 0, tl.minimum(frames.sink, begin), begin, end


@triton.jit
def seeing_run(k, last, frames):
    """Query frames among [q_start, last) that see key frames k: one run [begin, end), empty where end <= begin.

    Under teacher forcing those of k's own half: see noisy_seeing_run.
    """
    first = frames.q_start
    if frames.clean is not None:
        half = tl.where(k >= frames.clean, frames.clean, 0)
        c = (k - half) // frames.chunk
        in_reach = tl.where((half > 0) | (frames.past == 0), (c + 1) * frames.chunk, _clean_reach(c, frames))
        begin = tl.maximum(first, half + c * frames.chunk)
        return begin, tl.minimum(last, half + tl.minimum(in_reach, frames.clean))
    else:
        c = k // frames.chunk
        begin = tl.where(frames.future < 0, first, tl.maximum(first, (c - frames.future) * frames.chunk))
        in_reach = tl.minimum(last, (c + frames.past + 1) * frames.chunk)
        if frames.shots is not None:
            in_reach = tl.maximum(in_reach, tl.minimum(last, _shot_of(k, 1, frames)))
        return begin, tl.where((frames.past < 0) | (k < frames.sink), last, in_reach)


@triton.jit
def _clean_reach(c, frames):
    """Where the frames of the clean half end whose window holds chunk c."""
    return tl.where(frames.past < 0, frames.clean, tl.minimum((c + frames.past + 1) * frames.chunk, frames.clean))


@triton.jit
def noisy_seeing_run(k, last, frames):
    """Noisy query frames that see clean key frames k, as seeing_run counts them; for noisy k it is empty."""
    c = k // frames.chunk
    begin = tl.maximum(frames.q_start, frames.clean + tl.minimum((c + 1) * frames.chunk, frames.clean))
    end = tl.minimum(last, frames.clean + _clean_reach(c, frames))
    return begin, tl.where(k < frames.clean, end, begin)


@triton.jit
def load_length(p_len, i, most):
    """The i-th length: below 0 counts as 0, above ``most`` as ``most``."""
    return tl.minimum(tl.maximum(tl.load(p_len + i), 0), most).to(tl.int32)


@triton.jit
def valid_frames(p_len, i_b, frames):
    """Of sample i_b: the first key frame that is invisible, and the first query frame (q_start + t) that is dead.

    Where no query frame is alive, no key frame is visible.
    """
    last = frames.q_start + frames.T
    valid = frames.T_k + 0
    if p_len is not None:
        length = load_length(p_len, i_b, tl.maximum(frames.T_k, last))
        last = tl.minimum(last, length)
        valid = tl.where(last > frames.q_start, tl.minimum(valid, length), 0)
    return valid, last


@triton.jit
def is_seen(k, last, frames):
    """Whether any query frame below ``last`` sees key frames k."""
    begin, end = seeing_run(k, last, frames)
    seen = begin < end
    if frames.clean is not None:
        begin, end = noisy_seeing_run(k, last, frames)
        seen = seen | (begin < end)
    return seen


@triton.jit
def frame_pairs(p_len, i_b, frames, o_t, o_f, MASKED: tl.constexpr):
    """Of query frames o_t [BQ] those that see something, of key frames o_f [BK] those that are seen, and who sees
    whom [1, BQ, BK]."""
    valid, last = valid_frames(p_len, i_b, frames)
    m_t = (frames.q_start + o_t < last) & (valid > 0)
    m_f = o_f < valid
    seen = m_t[:, None] & m_f[None, :]
    if MASKED:
        low, low_end, begin, end = visible_runs(frames.q_start + o_t, valid, frames)
        m_t = m_t & ((low < low_end) | (begin < end))
        seen = seen & (o_f[None, :] < end[:, None])
        if frames.clean is None and frames.shots is None:
            seen = seen & ((o_f[None, :] >= begin[:, None]) | (o_f[None, :] < low_end[:, None]))
        else:
            in_low = (o_f[None, :] >= low[:, None]) & (o_f[None, :] < low_end[:, None])
            seen = seen & ((o_f[None, :] >= begin[:, None]) | in_low)
        m_f = m_f & is_seen(o_f, last, frames)
    return m_t, m_f, seen[None, :, :]


class Sequences(NamedTuple):
    """Sequences that a program holds: their sample, and position, head and existence of each, [BP]."""

    b: Any
    s: Any
    h: Any
    m: Any


class Shape(NamedTuple):
    """Constants of temporal kernels.

    Args:
        ROW, V: rows of q and k, and of v and out.
        A: elements per step of a stride.
        R: query heads per key/value head.
        BP, BQ, BK: sequences of a program; places for their query and key frames, powers of two.
        MASKED: something is hidden.
        GATE_ROWS, GATE_FRAMES: a gate varies with the channel, with the frame.
        PER_SEQUENCE: sequences are rotated by angles of their own.
        SAME: q and k by the same ones.
        NR: norm and rotary embedding.
    """

    ROW: Any
    V: Any
    A: int
    R: int
    BP: int
    BQ: int
    BK: int
    MASKED: bool
    GATE_ROWS: bool
    GATE_FRAMES: bool
    PER_SEQUENCE: bool
    SAME: bool
    NR: Any


class Side(NamedTuple):
    """q or k: its Rows, norm and table of angles, the table's row for its frame 0, its frames, and tokens of each."""

    x: Any
    norm: Any
    angles: Any
    start: Any
    T: Any
    S: Any


class Turn(NamedTuple):
    """What a norm takes of memory for rows: statistics [BP, BT, 1] over all heads, weight and bias [..., W]. Each 0.0
    where it is not needed.
    """

    mean: Any
    rstd: Any
    w: Any
    b: Any


@triton.jit
def sequence_block(i, S, G, BP: tl.constexpr):
    """The sequences (position, key/value head) of the i-th of all samples' blocks."""
    blocks = tl.cdiv(S * G, BP)
    o_n = (i % blocks) * BP + tl.arange(0, BP)
    return Sequences((i // blocks).to(tl.int64), (o_n // G).to(tl.int64), (o_n % G).to(tl.int64), o_n < S * G)


@triton.jit
def query_head(at, i_r, R: tl.constexpr):
    """The same positions with the i_r-th of the R query heads that share the key/value head."""
    return Sequences(at.b, at.s, at.h * R + i_r, at.m)


@triton.jit
def row_offsets(at, o_t, T, S, H):
    """[BP, BT]: rows of sequences at frames o_t [BT] in a contiguous (B, T, S, H)."""
    return ((at.b * T + o_t)[None, :] * S + at.s[:, None]) * H + at.h[:, None]


@triton.jit
def load_frames(x, at, o_t, m_t, A: tl.constexpr, ROW: tl.constexpr):
    """Rows of sequences at frames o_t [BT] of Rows x: tiles [BP, BT, W]; 0 where masked."""
    o = (at.s * x.s + at.h * x.h)[:, None] + (o_t.to(tl.int64) * x.t)[None, :]
    return load_rows(x.p + at.b * x.b * A, o * A, at.m[:, None] & m_t[None, :], ROW)


@triton.jit
def load_dlse(p_dlse, o_row, m_row):
    """[BP, BQ, 1]: the gradient of lse, 0 where there is none."""
    if p_dlse is not None:
        return tl.load(p_dlse + o_row, mask=m_row, other=0.0)[:, :, None]
    else:
        return 0.0


@triton.jit
def store_frames(x, at, o_t, T, b_x, A: tl.constexpr, ROW: tl.constexpr):
    """Stores rows of sequences at all of T frames."""
    o = (at.s * x.s + at.h * x.h)[:, None] + (o_t.to(tl.int64) * x.t)[None, :]
    store_rows(x.p + at.b * x.b * A, o * A, at.m[:, None] & (o_t < T)[None, :], b_x, ROW)


@triton.jit
def load_turn(side, at, o_t, m_t, SHAPE: tl.constexpr):
    """The norm's Turn of rows of sequences at frames o_t [BT]: read beside the rows, long before it is used."""
    ROW: tl.constexpr = SHAPE.ROW
    NR: tl.constexpr = SHAPE.NR
    norm = side.norm
    mean, rstd = 0.0, 0.0
    m = at.m[:, None] & m_t[None, :]
    if NR.ALL:
        p_row = norm.stats + ((at.b * side.T + o_t)[None, :] * side.S + at.s[:, None]) * 2
        mean = tl.load(p_row, mask=m, other=0.0)[:, :, None]
        rstd = tl.load(p_row + 1, mask=m, other=0.0)[:, :, None]
    w, b = load_affine(norm, (at.h * ROW.D)[:, None], m, ROW, NR.ALL)
    return Turn(mean, rstd, w, b)


@triton.jit
def load_frame_angles(side, at, o_t, m_t, SHAPE: tl.constexpr):
    """Cosines and sines [BP, BT, W/2] of sequences at frames o_t [BT]; [BT, W/2] where sequences share them."""
    ROW: tl.constexpr = SHAPE.ROW
    NR: tl.constexpr = SHAPE.NR
    angles, o_t = side.angles, side.start + o_t
    if NR.STYLE == 0:
        return 1.0, 0.0
    else:
        if SHAPE.PER_SEQUENCE:
            o_cos = (at.s * angles.cs + at.h * angles.ch)[:, None] + (o_t * angles.cf)[None, :]
            o_sin = (at.s * angles.ss + at.h * angles.sh)[:, None] + (o_t * angles.sf)[None, :]
            m = at.m[:, None] & m_t[None, :]
        else:
            o_cos = o_t.to(tl.int64) * angles.cf
            o_sin = o_t.to(tl.int64) * angles.sf
            m = m_t
        return load_angles(angles.cos, o_cos, m, 1.0, ROW, NR), load_angles(angles.sin, o_sin, m, 0.0, ROW, NR)


@triton.jit
def normalized(b_x, turn, norm, m, SHAPE: tl.constexpr):
    """float32 rows [BP, BT, W] under the norm. m: [BP, BT], which of them exist."""
    ROW: tl.constexpr = SHAPE.ROW
    NR: tl.constexpr = SHAPE.NR
    b_y = to(b_x, tl.float32)
    if NR.KIND > 0:
        if NR.ALL:
            b_y = scale(center(b_y, turn.mean, m, ROW), turn.rstd)
        else:
            b_y, _ = standardize(b_y, m, ROW.D, norm.eps, ROW, NR.KIND, 0)
        b_y = affine(b_y, norm, turn.w, turn.b)
    return b_y


@triton.jit
def rotated(b_y, angles, dtype: tl.constexpr, NR: tl.constexpr):
    """float32 rows rotated, in dtype, as operands of a product."""
    cos, sin = angles
    if NR.STYLE > 0:
        b_y = rotate(b_y, cos, sin, NR.STYLE)
    return materialize_before_dot(to(b_y, dtype))


@triton.jit
def product(a, b):
    """[P, M, K] x [P, K, N]. One position alone is a plain product, which a warpgroup's instructions can serve."""
    if a.shape[0] == 1:
        b_a = tl.reshape(a, (a.shape[1], a.shape[2]))
        c = tl.dot(b_a, tl.reshape(b, (b.shape[1], b.shape[2])), input_precision="ieee")
        return tl.reshape(c, (1, a.shape[1], b.shape[2]))
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def transposed(x):
    """[P, M, N] -> [P, N, M]."""
    return tl.permute(x, (0, 2, 1))


@triton.jit
def inner(a, b):
    """Rows [P, M, D] times rows [P, N, D]: [P, M, N]."""
    s = product(a[0], transposed(b[0]))
    if len(a) > 1:
        s += product(a[1], transposed(b[1]))
    return s


@triton.jit
def _finite(x):
    """x with 0 for what is not finite, and of every row [P, N, 1] 0, or NaN where there was such."""
    zero = x.to(tl.float32) * 0.0
    return tl.where(zero == 0.0, x, 0.0).to(x.dtype), tl.sum(zero, 2, keep_dims=True)


@triton.jit
def finite_rows(x, MASKED: tl.constexpr):
    """Rows [P, N, W] as a product takes them whose weights are 0 where something is hidden, and their flags [P, N, 1].

    A hidden NaN or infinity must not come in as 0 * NaN, and one that is seen must come out. So x goes through the
    product without such values, and who sees one becomes NaN as a whole by the row's flag: 0, or NaN (poisoned). Where
    all rows see the same, hidden ones were never loaded.
    """
    if MASKED:
        x0, flag = _finite(x[0])
        if len(x) > 1:
            x1, of_1 = _finite(x[1])
            return (x0, x1), flag + of_1
        else:
            return (x0,), flag
    else:
        return x, tl.zeros([1, 1, 1], tl.float32)


@triton.jit
def poisoned(s, flag, seen, hidden):
    """s [P, M, K] with the flags [P, M or 1, K or 1] of what is seen, and ``hidden`` elsewhere."""
    return tl.where(seen, s + flag, hidden)


@triton.jit
def weighted(p, x):
    """p [P, M, K], 0 where hidden, times rows x [P, K, W]."""
    p = p.to(x[0].dtype)
    if len(x) > 1:
        return product(p, x[0]), product(p, x[1])
    else:
        return (product(p, x[0]),)
