"""Tiles of tokens: what frame and cross attention's kernels share.

Queries whose frames share a chunk see the same keys, so a tile of queries never leaves its chunk, and all its rows see
the same one or two runs of key tokens, and the text. A kernel walks through these as tiles: whole ones without any
mask, then what is left of each run. What no row sees is never loaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.frames import load_length, valid_frames, visible_runs
from vdcore_kernels.core.tile import Rows, load_rows, store_rows


class Sizes(NamedTuple):
    """Frames of q and k, tokens a frame of q and of k, text tokens, query heads."""

    T: Any
    T_k: Any
    S_q: Any
    S_k: Any
    L: Any
    H: Any


class Mask(NamedTuple):
    """Numbers of a FrameMask, as mask_numbers gives them, and the key frame of the first query frame."""

    q_start: Any
    past: Any
    future: Any
    chunk: Any
    sink: Any


class Lengths(NamedTuple):
    """Valid frames ``(B,)``; valid tokens of every key frame ``(B, T_k)``; valid text ``(B,)``. Each or None."""

    frames: Any
    tokens: Any
    text: Any


# Tokens less than so many elements apart: a tile's offsets fit 32 bits, half the registers.
NEAR = 2**22


def token_rows_of(x: Tensor, A: int) -> tuple[Rows, bool]:
    """Rows of ``(B, T, S, heads, D)``, and whether its tokens are evenly spaced through all frames, and near."""
    B, T, S, H, _ = x.shape
    b, t, s, h = (n // A for n in x.stride()[:4])
    s = t if S == 1 else s
    flat = (T == 1 or t == S * s) and s * A < NEAR
    return Rows(x, b if B > 1 else 0, t, s, h if H > 1 else 0), flat


def near(x: Tensor | None) -> Tensor | None:
    """A sequence ``(B, L, heads, D)``, copied in the rare case that its tokens are far apart."""
    return x if x is None or x.stride(1) < NEAR else x.contiguous()


def sequence_rows(x: Tensor | None, A: int) -> Rows:
    """Rows of a near sequence."""
    if x is None:
        return Rows(None, 0, 0, 0, 0)
    return Rows(x, x.stride(0) // A, 0, x.stride(1) // A, x.stride(2) // A)


@triton.jit
def _place(
    x, text, is_text, i_b, i_h, start, S, N: tl.constexpr, A: tl.constexpr, FLAT: tl.constexpr, TEXT: tl.constexpr
):
    """Pointer and offsets [N] of tokens start + [0, N): of the text, or of all frames with S tokens each."""
    o_n = tl.arange(0, N)
    p = x.p + (i_b * x.b + i_h * x.h) * A
    if FLAT:
        p += start.to(tl.int64) * x.s * A
        o = o_n * x.s
    else:
        o = ((start + o_n) // S).to(tl.int64) * x.t + ((start + o_n) % S).to(tl.int64) * x.s
    if TEXT:
        p_text = text.p + (i_b * text.b + i_h * text.h + start.to(tl.int64) * text.s) * A
        p = tl.where(is_text, p_text, p)
        o = tl.where(is_text, o_n * text.s, o)
    return p, o * A


@triton.jit
def load_tokens(
    x,
    text,
    is_text,
    i_b,
    i_h,
    start,
    m,
    S,
    N: tl.constexpr,
    A: tl.constexpr,
    FLAT: tl.constexpr,
    TEXT: tl.constexpr,
    ROW: tl.constexpr,
):
    """Rows of tokens start + [0, N): tiles [N, W]; 0 where m [N] is false."""
    p, o = _place(x, text, is_text, i_b, i_h, start, S, N, A, FLAT, TEXT)
    return load_rows(p, o, m, ROW)


@triton.jit
def store_tokens(
    x,
    text,
    is_text,
    i_b,
    i_h,
    start,
    m,
    S,
    b_x,
    N: tl.constexpr,
    A: tl.constexpr,
    FLAT: tl.constexpr,
    TEXT: tl.constexpr,
    ROW: tl.constexpr,
):
    p, o = _place(x, text, is_text, i_b, i_h, start, S, N, A, FLAT, TEXT)
    store_rows(p, o, m, b_x, ROW)


@triton.jit
def text_length(lengths, i_b, L):
    n = L + 0
    if lengths.text is not None:
        n = load_length(lengths.text, i_b, L)
    return n


@triton.jit
def valid_key_frames(lengths, i_b, T_k):
    """Key frames that text sees."""
    n = T_k + 0
    if lengths.frames is not None:
        n = load_length(lengths.frames, i_b, T_k)
    return n


@triton.jit
def query_tile(i, lengths, i_b, sizes, mask, BM: tl.constexpr, TEXT: tl.constexpr, TEXT_SEES: tl.constexpr):
    """Of the i-th tile of queries: whether it is text, its first token, how many rows it has, how many of them live,
    and the key tokens they see: [0, low), [begin, end), and so many of the text.
    """
    T, T_k, S_q, S_k, L, H = sizes
    q_start, past, future, chunk, sink = mask
    per_group = tl.cdiv(tl.minimum(chunk, T) * S_q, BM)
    groups = (q_start + T - 1) // chunk - q_start // chunk + 1
    valid, last = valid_frames(lengths.frames, i_b, T, T_k, q_start)
    c = q_start // chunk + i // per_group
    first = tl.maximum(c * chunk, q_start)
    stop = tl.minimum((c + 1) * chunk, q_start + T)
    o = i % per_group * BM
    start = (first - q_start) * S_q + o
    n_rows = tl.minimum(tl.maximum((stop - first) * S_q - o, 0), BM)
    n_live = tl.minimum(tl.maximum((tl.minimum(stop, last) - first) * S_q - o, 0), BM)
    low, begin, end = visible_runs(first, valid, past, future, chunk, sink)
    low, begin, end = low * S_k, begin * S_k, end * S_k
    if lengths.tokens is not None:
        shown = tl.load(lengths.tokens + i_b * T_k + begin // S_k, mask=begin < end, other=0)
        end = begin + tl.minimum(tl.maximum(shown, 0), end - begin).to(tl.int32)
    is_text = i < 0
    n_text = 0
    if TEXT:
        n_text = text_length(lengths, i_b, L)
        is_text = i >= groups * per_group
        o_text = (i - groups * per_group) * BM
        start = tl.where(is_text, o_text, start)
        n_rows = tl.where(is_text, tl.minimum(L - o_text, BM), n_rows)
        n_live = tl.where(is_text, tl.minimum(tl.maximum(n_text - o_text, 0), BM), n_live)
        seen = 0
        if TEXT_SEES:
            seen = valid_key_frames(lengths, i_b, T_k) * S_k
        low = tl.where(is_text, 0, low)
        begin = tl.where(is_text, 0, begin)
        end = tl.where(is_text, seen, end)
    if n_live <= 0:
        low, end, n_text = 0, begin, 0
    return is_text, start, n_rows, n_live, low, begin, end, n_text


def query_tiles(T: int, S_q: int, L: int, q_start: int, chunk: int, BM: int) -> int:
    """How many tiles query_tile knows."""
    groups = (q_start + T - 1) // chunk - q_start // chunk + 1
    return groups * -(-min(chunk, T) * S_q // BM) + -(-L // BM)


@triton.jit
def walk(low, begin, end, n_text, BN: tl.constexpr):
    """Whole tiles of the three runs, and how many runs leave a part of one over."""
    n_low = low // BN
    n_run = tl.maximum(end - begin, 0) // BN
    n_txt = n_text // BN
    left = tl.where(low % BN > 0, 1, 0) + tl.where((end > begin) & ((end - begin) % BN > 0), 1, 0)
    return n_low, n_run, n_txt, left + tl.where(n_text % BN > 0, 1, 0)


@triton.jit
def whole_tile(i, n_low, n_run, begin, BN: tl.constexpr):
    """First token of the i-th whole tile, and whether it is text."""
    is_text = i >= n_low + n_run
    start = tl.where(i < n_low, i * BN, begin + (i - n_low) * BN)
    return tl.where(is_text, (i - n_low - n_run) * BN, start), is_text


@triton.jit
def left_tile(i, low, begin, end, n_text, BN: tl.constexpr):
    """First token and end of the i-th part that is left, and whether it is text."""
    has_low = low % BN > 0
    has_run = (end > begin) & ((end - begin) % BN > 0)
    is_low = has_low & (i == 0)
    is_run = has_run & (i == tl.where(has_low, 1, 0))
    stop = tl.where(is_low, low, tl.where(is_run, end, n_text))
    count = tl.where(is_low, low, tl.where(is_run, end - begin, n_text)) % BN
    return stop - count, stop, ~(is_low | is_run)
