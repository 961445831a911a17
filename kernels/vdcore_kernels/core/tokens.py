"""Tiles of tokens: what frame and cross attention's kernels share.

Queries whose frames share a chunk see the same keys, so a tile of queries never leaves its chunk, and all its rows see
the same one or two runs of key tokens, and the text. A kernel walks through these as tiles: whole ones without any
mask, then what is left of each run. What no row sees is never loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.frames import load_length, valid_frames, visible_runs
from vdcore_kernels.core.launch import is_amd
from vdcore_kernels.core.tile import Rows, load_rows, store_rows


class Sizes(NamedTuple):
    """Tokens per frame of q and of k, text tokens, query heads."""

    S_q: Any
    S_k: Any
    L: Any
    H: Any


class Lengths(NamedTuple):
    """Valid frames ``(B,)``; valid tokens of every key frame ``(B, T_k)``; valid text ``(B,)``. Each or None."""

    frames: Any
    tokens: Any
    text: Any


class Pair(NamedTuple):
    """Rows of the video ``(B, T, S, heads, D)`` and of the text ``(B, L, heads, D)``, its pointer None without text."""

    video: Any
    text: Any


class Tile(NamedTuple):
    """Constants of kernels over tiles of tokens.

    Args:
        ROW, A: rows, and elements per step of a stride.
        R: query heads per key/value head.
        BM, BN: queries and keys of a tile.
        FLAT: tokens are evenly spaced through all frames.
        TEXT: there is text.
        TEXT_FIRST: it comes before the video in the result, else after it.
        TEXT_SEES: it sees the video.
        AMD: 0, or for AMD's GPUs what amd_alignment says.
    """

    ROW: Any
    A: int
    R: int
    BM: int
    BN: int
    FLAT: bool
    TEXT: bool
    TEXT_FIRST: bool
    TEXT_SEES: bool
    AMD: int


class At(NamedTuple):
    """Where a tile's rows are: in the text or in all frames, which sample and head, the first token."""

    is_text: Any
    b: Any
    h: Any
    start: Any


class Runs(NamedTuple):
    """Tokens that a tile sees or is seen by: [low, low_end) and [begin, end) of the video, and so many of the text."""

    low: Any
    low_end: Any
    begin: Any
    end: Any
    n_text: Any


# Tokens less than so many elements apart: a tile's offsets fit 32 bits, half the registers.
NEAR = 2**22


def near(x: Tensor) -> Tensor:
    """A sequence ``(B, L, heads, D)``, copied in the rare case that its tokens are far apart."""
    return x if x.stride(1) < NEAR else x.contiguous()


NO_ROWS = Rows(None, 0, 0, 0, 0)


def sequence_rows(x: Tensor, A: int) -> Rows:
    """Rows of a near sequence."""
    return Rows(x, x.stride(0) // A, 0, x.stride(1) // A, x.stride(2) // A)


class Layout(NamedTuple):
    """How tensors of tokens lie.

    Args:
        A: elements per step of a stride.
        pairs: the tensors, each with its text.
        flat: in all of them tokens are evenly spaced through all frames, and near.
    """

    A: int
    pairs: tuple[Pair, ...]
    flat: bool


def layout_of(video: Sequence[Tensor], text: Sequence[Tensor] | None, *others: Tensor) -> Layout:
    """Of ``(B, T, S, heads, D)`` and near sequences, one for each or None; ``others`` have the same step."""
    every = (*video, *(text or ()), *others)
    size = max(x.element_size() for x in every)
    A, steps_of, flat = _steps_of(size, len(video), *((x.shape, x.stride()) for x in every))
    of_video = [Rows(x, *n) for x, n in zip(video, steps_of)]
    of_text = [NO_ROWS] * len(video) if text is None else [Rows(x, *n) for x, n in zip(text, steps_of[len(video) :])]
    return Layout(A, tuple(map(Pair, of_video, of_text)), flat)


@lru_cache(maxsize=1024)
def _steps_of(
    size: int, videos: int, *layouts: tuple[torch.Size, tuple[int, ...]]
) -> tuple[int, list[tuple[int, ...]], bool]:
    """Kept, since Python's time is eager mode's: the step, all strides in it, and whether the videos are flat."""
    A = 16 // size
    for shape, strides in layouts:
        for n, stride in zip(shape[:-1], strides[:-1]):
            while n > 1 and stride % A:
                A //= 2
    found: list[tuple[int, ...]] = []
    flat = True
    for shape, strides in layouts[:videos]:
        (B, T, S, heads, _), (b, t, s, h, _) = shape, strides
        s = t if S == 1 else s
        flat = flat and (T == 1 or t == S * s) and s < NEAR
        found.append((b // A if B > 1 else 0, t // A, s // A, h // A if heads > 1 else 0))
    for shape, strides in layouts[videos:]:
        if len(shape) == 4:
            found.append((strides[0] // A, 0, strides[1] // A, strides[2] // A))
    return A, found, flat


def amd_alignment(sides: Iterable[Pair], A: int) -> int:
    """For AMD's GPUs how many bytes, up to A elements, divide the addresses of all rows; 0 for others."""
    tensors = [x for side in sides for x in (side.video.p, side.text.p) if x is not None]
    if not is_amd(tensors[0]):
        return 0
    size = A * min(x.element_size() for x in tensors)
    while any(x.data_ptr() % size for x in tensors):
        size //= 2
    return size


@triton.jit
def times_rows(a, b):
    """Rows [M, D] times rows [N, D]: [M, N]."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) > 1:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")
    return s


@triton.jit
def rows_times(p, x, total):
    """total [M, D] plus p [M, N] times rows [N, D]."""
    if len(x) > 1:
        first = tl.dot(p, x[0], total[0], input_precision="ieee")
        return first, tl.dot(p, x[1], total[1], input_precision="ieee")
    else:
        return (tl.dot(p, x[0], total[0], input_precision="ieee"),)


@triton.jit
def power(s, less, exponent):
    """2 ** ((s - less) * exponent), one fused multiply and add per score."""
    return tl.exp2(s * exponent - less * exponent)


@triton.jit
def either_pointer(is_first, p_first, p, AMD: tl.constexpr):
    """p_first where is_first, else p.

    AMD: by their addresses, of which so many bytes are a divisor. Triton 3.6 keeps a pointer of AMD's as a base and an
    offset, and where two of them are chosen between it crashes, or takes the offset of one for both.
    """
    if AMD > 0:
        address = tl.where(is_first, p_first.to(tl.int64), p.to(tl.int64))
        return tl.multiple_of(address.to(p.dtype), AMD)
    else:
        return tl.where(is_first, p_first, p)


@triton.jit
def _place(x, at, S, N: tl.constexpr, TILE: tl.constexpr):
    """Pointer and offsets [N] of tokens from at.start on: of the text, or of all frames with S tokens each."""
    A: tl.constexpr = TILE.A
    o_n = tl.arange(0, N)
    p = x.video.p + (at.b * x.video.b + at.h * x.video.h) * A
    if TILE.FLAT:
        p += at.start.to(tl.int64) * x.video.s * A
        o = o_n * x.video.s
    else:
        o = ((at.start + o_n) // S).to(tl.int64) * x.video.t + ((at.start + o_n) % S).to(tl.int64) * x.video.s
    if TILE.TEXT:
        p_text = x.text.p + (at.b * x.text.b + at.h * x.text.h + at.start.to(tl.int64) * x.text.s) * A
        p = either_pointer(at.is_text, p_text, p, TILE.AMD)
        o = tl.where(at.is_text, o_n * x.text.s, o)
    return p, o * A


@triton.jit
def load_tokens(x, at, m, S, N: tl.constexpr, TILE: tl.constexpr):
    """Rows of N tokens of a Pair: tiles [N, W]; 0 where m [N] is false."""
    ROW: tl.constexpr = TILE.ROW
    p, o = _place(x, at, S, N, TILE)
    return load_rows(p, o, m, ROW)


@triton.jit
def store_tokens(x, at, m, S, b_x, N: tl.constexpr, TILE: tl.constexpr):
    """Stores what load_tokens loads."""
    ROW: tl.constexpr = TILE.ROW
    p, o = _place(x, at, S, N, TILE)
    store_rows(p, o, m, b_x, ROW)


@triton.jit
def load_keys(k, v, at, stop, S, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Keys and values [BN, W] of one tile, and which are below ``stop`` [BN]; WHOLE: all."""
    m = tl.full([TILE.BN], 1, tl.int1) if WHOLE else at.start + tl.arange(0, TILE.BN) < stop
    return load_tokens(k, at, m, S, TILE.BN, TILE), load_tokens(v, at, m, S, TILE.BN, TILE), m


@triton.jit
def result_token(at, sizes, frames, TILE: tl.constexpr):
    """A tile's first token in its sample of the result (B, N, H, D), and N."""
    of_video = frames.T * sizes.S_q
    if TILE.TEXT_FIRST:
        first = tl.where(at.is_text, 0, sizes.L)
    else:
        first = tl.where(at.is_text, of_video, 0)
    return (first + at.start).to(tl.int64), of_video + sizes.L


@triton.jit
def result_row(at, sizes, frames, TILE: tl.constexpr):
    """A tile's first row in the result (B, N, H): the others are H apart."""
    first, N = result_token(at, sizes, frames, TILE)
    return (at.b * N + first) * sizes.H + at.h


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
def query_tile(tiles, lengths, sizes, frames, TILE: tl.constexpr):
    """The program's tile of queries: where it is, how many rows it has, how many of them live, what these see."""
    i_bh = tl.program_id(0) // tiles
    i_b = (i_bh // sizes.H).to(tl.int64)
    i_h = (i_bh % sizes.H).to(tl.int64)
    # The last frames of a causal mask see the most: they go first, so that no SM is left with one of them at the end.
    i = tiles - 1 - tl.program_id(0) % tiles
    BM: tl.constexpr = TILE.BM
    T, S_q, q_start, group = frames.T, sizes.S_q, frames.q_start, frames.group
    per_group = tl.cdiv(tl.minimum(group, T) * S_q, BM)
    groups = (q_start + T - 1) // group - q_start // group + 1
    valid, last = valid_frames(lengths.frames, i_b, frames)
    c = q_start // group + i // per_group
    first = tl.maximum(c * group, q_start)
    stop = tl.minimum((c + 1) * group, q_start + T)
    o = i % per_group * BM
    start = (first - q_start) * S_q + o
    n_rows = tl.minimum(tl.maximum((stop - first) * S_q - o, 0), BM)
    n_live = tl.minimum(tl.maximum((tl.minimum(stop, last) - first) * S_q - o, 0), BM)
    low, low_end, begin, end = visible_runs(first, valid, frames)
    low, low_end, begin, end = low * sizes.S_k, low_end * sizes.S_k, begin * sizes.S_k, end * sizes.S_k
    if lengths.tokens is not None:
        shown = tl.load(lengths.tokens + i_b * frames.T_k + begin // sizes.S_k, mask=begin < end, other=0)
        end = begin + tl.minimum(tl.maximum(shown, 0), end - begin).to(tl.int32)
    is_text = i < 0
    n_text = 0
    if TILE.TEXT:
        n_text = text_length(lengths, i_b, sizes.L)
        is_text = i >= groups * per_group
        o_text = (i - groups * per_group) * BM
        start = tl.where(is_text, o_text, start)
        n_rows = tl.where(is_text, tl.minimum(sizes.L - o_text, BM), n_rows)
        n_live = tl.where(is_text, tl.minimum(tl.maximum(n_text - o_text, 0), BM), n_live)
        seen = 0
        if TILE.TEXT_SEES:
            seen = valid_key_frames(lengths, i_b, frames.T_k) * sizes.S_k
        low_end = tl.where(is_text, low, low_end)
        begin = tl.where(is_text, 0, begin)
        end = tl.where(is_text, seen, end)
    if n_live <= 0:
        low_end, end, n_text = low + 0, begin, 0
    return At(is_text, i_b, i_h, start), n_rows, n_live, Runs(low, low_end, begin, end, n_text)


def query_tiles(T: int, S_q: int, L: int, q_start: int, group: int, BM: int) -> int:
    """How many tiles query_tile knows, per sample and head."""
    groups = (q_start + T - 1) // group - q_start // group + 1
    return groups * -(-min(group, T) * S_q // BM) + -(-L // BM)


class Walk(NamedTuple):
    """How a program goes through Runs: so many whole tiles of the first, of the first two and of all three, and then so
    many parts that are left."""

    runs: Any
    n_low: Any
    n_video: Any
    n_whole: Any
    n_left: Any


@triton.jit
def walk(runs, N: tl.constexpr):
    """In tiles of N tokens."""
    low, low_end, begin, end, n_text = runs
    n_low = (low_end - low) // N
    n_video = n_low + tl.maximum(end - begin, 0) // N
    left = tl.where((low_end - low) % N > 0, 1, 0) + tl.where((end > begin) & ((end - begin) % N > 0), 1, 0)
    return Walk(runs, n_low, n_video, n_video + n_text // N, left + tl.where(n_text % N > 0, 1, 0))


@triton.jit
def whole_tile(i, at, steps, N: tl.constexpr):
    """Where the i-th whole tile of a Walk is, of at's sample and head."""
    is_text = i >= steps.n_video
    start = tl.where(i < steps.n_low, steps.runs.low + i * N, steps.runs.begin + (i - steps.n_low) * N)
    return At(is_text, at.b, at.h, tl.where(is_text, (i - steps.n_video) * N, start))


@triton.jit
def left_tile(i, at, steps, N: tl.constexpr):
    """Where the i-th part that is left is, and its end."""
    low, low_end, begin, end, n_text = steps.runs
    has_low = (low_end - low) % N > 0
    has_run = (end > begin) & ((end - begin) % N > 0)
    is_low = has_low & (i == 0)
    is_run = has_run & (i == tl.where(has_low, 1, 0))
    stop = tl.where(is_low, low_end, tl.where(is_run, end, n_text))
    count = tl.where(is_low, low_end - low, tl.where(is_run, end - begin, n_text)) % N
    return At(~(is_low | is_run), at.b, at.h, stop - count), stop


@triton.jit
def key_head(at, TILE: tl.constexpr):
    """Sample and key/value head of a tile of queries."""
    return At(False, at.b, at.h // TILE.R, 0)


@triton.jit
def first_keys(at, runs, N):
    """The first N keys, or fewer, in the longest of the runs, of at's sample and head; and how many these are."""
    low, low_end, begin, end, n_text = runs
    n_low = low_end - low
    is_text = n_text > tl.maximum(n_low, end - begin)
    is_run = (end - begin >= n_low) & ~is_text
    start = tl.where(is_run, begin, tl.where(is_text, 0, low))
    count = tl.minimum(tl.where(is_text, n_text, tl.where(is_run, end - begin, n_low)), N)
    return At(is_text, at.b, at.h, start), count
