"""Spatial, video and cross attention backward: delta, then the queries' gradient, then the keys' and values'.

Every gradient is summed by one program in a fixed order: no atomics, at the price of computing the scores twice (seven
products for five). Probabilities come back from lse; tiles are walked through as forward walks.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore_kernels.core.frames import mask_numbers, seeing_run, valid_frames
from vdcore_kernels.core.launch import Config, cdiv, launch, power_of_2, step
from vdcore_kernels.core.products import power, rows_times, times_rows
from vdcore_kernels.core.tile import (
    Row,
    add,
    column_sum,
    filled,
    keep,
    load_rows,
    mul,
    row_sum,
    scale,
    split_row,
    to,
)
from vdcore_kernels.core.tokens import (
    NEAR,
    Lengths,
    Mask,
    left_tile,
    load_tokens,
    near,
    query_tile,
    query_tiles,
    sequence_rows,
    store_tokens,
    text_length,
    token_rows_of,
    valid_key_frames,
    walk,
    whole_tile,
)
from vdcore_kernels.frame_attention.forward import FrameConfig, base_2, frame_sizes, pick_for

LOG2_E = tl.constexpr(1.4426950408889634)

_FLOAT32 = "float32 is multiplied exactly, on the plain units: small tiles keep its operands in registers"
QUERIES = (
    FrameConfig("interpreter", 4, 1, "whole and partial tiles in a small case", 32, 32, 256, 4),
    FrameConfig("sm_9|sm_10", 4, 2, "predicted: a warpgroup holds 64 rows' scores and their gradient", 64, 64, 64),
    FrameConfig("sm_9", 8, 2, "predicted: keys and values of two stages, 128 KB", 128, 64, 128),
    FrameConfig("sm_10", 8, 2, "predicted: two stages; 64 keys would spill", 128, 32, 128),
    FrameConfig("sm_9|sm_10", 8, 1, "predicted: 256 channels: one stage", 32, 64, 256),
    FrameConfig("sm_8", 4, 2, "predicted: two stages of 64 keys", 64, 64, 64),
    FrameConfig("sm_8", 8, 1, "predicted: two tiles of 72 channels and 64 keys would spill", 64, 32, 128),
    FrameConfig("sm_8", 8, 1, "predicted: 163 KB of shared memory", 64, 32, 256),
    FrameConfig("gfx", 4, 1, "predicted: 64 KB of shared memory", 32, 32, 128),
    FrameConfig("gfx", 8, 1, "predicted: 64 KB of shared memory", 32, 16, 256),
    FrameConfig("", 8, 1, _FLOAT32, 16, 32, 128, 4),
    FrameConfig("", 8, 1, _FLOAT32, 32, 32, 256, 4),
)
# m: queries, walked through; n: keys, held.
KEYS = (
    FrameConfig("interpreter", 4, 1, "whole and partial tiles in a small case", 32, 32, 256, 4),
    FrameConfig("sm_9|sm_10", 4, 2, "predicted: two gradients of 64 rows in a warpgroup's registers", 64, 64, 64),
    FrameConfig("sm_9|sm_10", 8, 2, "predicted: two gradients of 128 rows take 128 registers", 32, 128, 128),
    FrameConfig("sm_9|sm_10", 8, 1, "predicted: two gradients of 256 channels leave room for 32 rows", 32, 32, 256),
    FrameConfig("sm_8", 4, 2, "predicted: two stages of 64 queries", 64, 64, 64),
    FrameConfig("sm_8", 8, 1, "predicted: 163 KB of shared memory", 32, 64, 128),
    FrameConfig("sm_8", 8, 1, "predicted: 163 KB of shared memory", 32, 32, 256),
    FrameConfig("gfx", 4, 1, "predicted: 64 KB of shared memory", 32, 32, 128),
    FrameConfig("gfx", 8, 1, "predicted: 64 KB of shared memory", 16, 32, 256),
    FrameConfig("", 8, 1, _FLOAT32, 16, 32, 128, 4),
    FrameConfig("", 8, 1, _FLOAT32, 32, 32, 256, 4),
)
DELTA = Config("", 4, 1, "predicted: bound by memory: 16 values a thread of out and its gradient")


@triton.jit(do_not_specialize=["N", "H", "lines"])
def row_delta_kernel(
    p_o,  # (B, N, H, D), contiguous
    do,  # Rows (B, N, H, D): t unused
    p_dlse,  # (B, N, H), or None
    p_delta,  # (B, N, H)
    N,
    H,
    lines,  # B*N*H
    ROW: tl.constexpr,
    A: tl.constexpr,
    BN: tl.constexpr,
):
    """delta = sum of out * dout over channels, less dlse."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < lines
    o_do = (o_n // H // N) * do.b + (o_n // H % N) * do.s + (o_n % H) * do.h
    b_o = to(load_rows(p_o, o_n * ROW.D, m_n, ROW), tl.float32)  # [BN, W]
    b_do = to(load_rows(do.p, o_do * A, m_n, ROW), tl.float32)
    b_d = tl.reshape(row_sum(mul(b_o, b_do), 0), (BN,))
    if p_dlse is not None:
        b_d -= tl.load(p_dlse + o_n, mask=m_n, other=0.0)
    tl.store(p_delta + o_n, b_d, mask=m_n)


@triton.jit
def _mean_key(
    k,
    text_k,
    i_b,
    i_g,
    low,
    begin,
    end,
    n_text,
    S,
    N: tl.constexpr,
    A: tl.constexpr,
    FLAT: tl.constexpr,
    TEXT: tl.constexpr,
    ROW: tl.constexpr,
):
    """The mean [1, W] of the first N keys in the longest of [0, low), [begin, end) and so many of the text."""
    is_text = n_text > tl.maximum(low, end - begin)
    is_run = (end - begin >= low) & ~is_text
    start = tl.where(is_run, begin, 0)
    count = tl.minimum(tl.where(is_text, n_text, tl.where(is_run, end - begin, low)), N)
    b_k = load_tokens(k, text_k, is_text, i_b, i_g, start, tl.arange(0, N) < count, S, N, A, FLAT, TEXT, ROW)
    return scale(column_sum(to(b_k, tl.float32)), 1.0 / tl.maximum(count, 1))


@triton.jit
def _to_queries(
    b_dq,
    b_sum,  # [BM]
    b_q,
    b_do,
    b_lse,  # [BM], in units of the scores
    b_delta,
    k,
    v,
    text_k,
    text_v,
    is_text,
    i_b,
    i_g,
    start,
    stop,
    S,
    exponent,
    BN: tl.constexpr,
    A: tl.constexpr,
    FLAT: tl.constexpr,
    TEXT: tl.constexpr,
    WHOLE: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries [BM, W], but for the scale, and row sums of dS, after keys [start, stop) of one tile."""
    m = tl.full([BN], 1, tl.int1) if WHOLE else start + tl.arange(0, BN) < stop
    b_k = load_tokens(k, text_k, is_text, i_b, i_g, start, m, S, BN, A, FLAT, TEXT, ROW)  # [BN, W]
    b_v = load_tokens(v, text_v, is_text, i_b, i_g, start, m, S, BN, A, FLAT, TEXT, ROW)
    b_p = power(times_rows(b_q, b_k, PRECISION), b_lse[:, None], exponent)  # [BM, BN]
    if not WHOLE:
        b_p = tl.where(m[None, :], b_p, 0.0)
    b_ds = (b_p * (times_rows(b_do, b_v, PRECISION) - b_delta[:, None])).to(b_k[0].dtype)
    return rows_times(b_ds, b_k, b_dq, PRECISION), b_sum + tl.sum(b_ds.to(tl.float32), 1)


@triton.jit(do_not_specialize=["sizes", "mask", "N", "o_video", "o_text", "tiles"])
def frame_attention_bwd_q_kernel(
    q,
    k,
    v,
    text_q,
    text_k,
    text_v,
    do,  # Rows (B, N, H, D): t unused
    dq,
    text_dq,
    p_lse,  # (B, N, H)
    p_delta,
    p_dlse,  # or None
    lengths,
    sizes,
    mask,
    N,
    o_video,
    o_text,
    tiles,
    exponent,
    factor,
    ROW: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FLAT: tl.constexpr,
    TEXT: tl.constexpr,
    TEXT_SEES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    H = sizes.H
    S_q, S_k = sizes.S_q, sizes.S_k
    i_bh = tl.program_id(0) // tiles
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    i_g = i_h // R
    i_tile = tiles - 1 - tl.program_id(0) % tiles
    is_text, start, n_rows, n_live, low, begin, end, n_text = query_tile(
        i_tile, lengths, i_b, sizes, mask, BM, TEXT, TEXT_SEES
    )
    o_n = tl.arange(0, BM)
    m_live = o_n < n_live
    b_q = load_tokens(q, text_q, is_text, i_b, i_h, start, m_live, S_q, BM, A, FLAT, TEXT, ROW)  # [BM, W]
    i_row = (tl.where(is_text, o_text, o_video) + start).to(tl.int64)
    b_do = load_rows(do.p + (i_b * do.b + i_h * do.h + i_row * do.s) * A, o_n * do.s * A, m_live, ROW)
    row = (i_b * N + i_row) * H + i_h
    b_lse = tl.load(p_lse + row + o_n * H, mask=m_live, other=0.0) * (LOG2_E / exponent)
    b_delta = tl.load(p_delta + row + o_n * H, mask=m_live, other=0.0)
    b_dq = filled(BM, 0.0, ROW)
    b_sum = tl.full([BM], 0.0, tl.float32)
    if p_dlse is not None:
        b_sum -= tl.load(p_dlse + row + o_n * H, mask=m_live, other=0.0)
    n_low, n_run, n_txt, n_left = walk(low, begin, end, n_text, BN)
    for i in range(n_low + n_run + n_txt):
        first, of_text = whole_tile(i, n_low, n_run, begin, BN)
        b_dq, b_sum = _to_queries(
            *(
                b_dq,
                b_sum,
                b_q,
                b_do,
                b_lse,
                b_delta,
                k,
                v,
                text_k,
                text_v,
                of_text,
                i_b,
                i_g,
                first,
                first,
                S_k,
                exponent,
            ),
            *(BN, A, FLAT, TEXT, True, ROW, PRECISION),
        )
    for i in range(n_left):
        first, stop, of_text = left_tile(i, low, begin, end, n_text, BN)
        b_dq, b_sum = _to_queries(
            *(
                b_dq,
                b_sum,
                b_q,
                b_do,
                b_lse,
                b_delta,
                k,
                v,
                text_k,
                text_v,
                of_text,
                i_b,
                i_g,
                first,
                stop,
                S_k,
                exponent,
            ),
            *(BN, A, FLAT, TEXT, False, ROW, PRECISION),
        )
    # out was rounded, so delta errs, by the same for all keys of a row: dq would err by that times the keys' mean. But
    # a row of dS adds up to dlse, and what it does add up to tells the error.
    b_mean = _mean_key(k, text_k, i_b, i_g, low, begin, end, n_text, S_k, 16, A, FLAT, TEXT, ROW)  # [1, W]
    b_dq = add(b_dq, scale(b_mean, -b_sum[:, None]))
    b_dq = keep(scale(b_dq, factor), m_live[:, None])
    store_tokens(dq, text_dq, is_text, i_b, i_h, start, o_n < n_rows, S_q, b_dq, BM, A, FLAT, TEXT, ROW)


@triton.jit
def key_tile(i, lengths, i_b, sizes, mask, group, BN: tl.constexpr, TEXT: tl.constexpr, TEXT_SEES: tl.constexpr):
    """Of the i-th tile of keys: whether it is text, its first token, how many rows it has, how many of them live, and
    the query tokens that see them: [begin, end), and so many of the text.
    """
    T, T_k, S_q, S_k, L, H = sizes
    q_start, past, future, chunk, sink = mask
    per_group = tl.cdiv(group * S_k, BN)
    groups = tl.cdiv(T_k, group)
    valid, last = valid_frames(lengths.frames, i_b, T, T_k, q_start)
    first = i // per_group * group
    stop = tl.minimum(first + group, T_k)
    o = i % per_group * BN
    start = first * S_k + o
    n_rows = tl.minimum(tl.maximum((stop - first) * S_k - o, 0), BN)
    shown = (tl.minimum(stop, valid_key_frames(lengths, i_b, T_k)) - first) * S_k
    if lengths.tokens is not None:
        of_frame = tl.load(lengths.tokens + i_b * T_k + first, mask=first < T_k, other=0)
        shown = tl.minimum(tl.maximum(of_frame, 0), shown).to(tl.int32)
    n_live = tl.minimum(tl.maximum(shown - o, 0), BN)
    begin, end = seeing_run(first, q_start, last, past, future, chunk, sink)
    begin, end = (begin - q_start) * S_q, (end - q_start) * S_q
    is_text = i < 0
    n_text = 0
    if TEXT:
        of_text = text_length(lengths, i_b, L)
        is_text = i >= groups * per_group
        o_text = (i - groups * per_group) * BN
        start = tl.where(is_text, o_text, start)
        n_rows = tl.where(is_text, tl.minimum(L - o_text, BN), n_rows)
        n_live = tl.where(is_text, tl.minimum(tl.maximum(of_text - o_text, 0), BN), n_live)
        begin = tl.where(is_text, 0, begin)
        end = tl.where(is_text, (last - q_start) * S_q, end)
        n_text = of_text
        if not TEXT_SEES:
            n_text = tl.where(is_text, of_text, 0)
    if n_live <= 0:
        end, n_text = begin, 0
    return is_text, start, n_rows, n_live, begin, end, n_text


@triton.jit
def _to_keys(
    b_dk,
    b_dv,
    b_k,
    b_v,
    q,
    text_q,
    do,
    p_lse,
    p_delta,
    is_text,
    i_b,
    i_h,
    start,
    stop,
    S,
    H,
    N,
    o_video,
    o_text,
    exponent,
    BM: tl.constexpr,
    A: tl.constexpr,
    FLAT: tl.constexpr,
    TEXT: tl.constexpr,
    WHOLE: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of keys, but for the scale, and of values [BN, W] after queries [start, stop) of one tile."""
    m = tl.full([BM], 1, tl.int1) if WHOLE else start + tl.arange(0, BM) < stop
    b_q = load_tokens(q, text_q, is_text, i_b, i_h, start, m, S, BM, A, FLAT, TEXT, ROW)  # [BM, W]
    o_m = tl.arange(0, BM)
    first = (tl.where(is_text, o_text, o_video) + start).to(tl.int64)
    b_do = load_rows(do.p + (i_b * do.b + i_h * do.h + first * do.s) * A, o_m * do.s * A, m, ROW)
    row = (i_b * N + first) * H + i_h
    b_lse = tl.load(p_lse + row + o_m * H, mask=m, other=float("inf")) * (
        LOG2_E / exponent
    )  # beyond the end: probability 0
    b_delta = tl.load(p_delta + row + o_m * H, mask=m, other=0.0)
    b_p = power(times_rows(b_k, b_q, PRECISION), b_lse[None, :], exponent)  # [BN, BM]
    b_dv = rows_times(b_p.to(b_do[0].dtype), b_do, b_dv, PRECISION)
    b_ds = b_p * (times_rows(b_v, b_do, PRECISION) - b_delta[None, :])
    return rows_times(b_ds.to(b_q[0].dtype), b_q, b_dk, PRECISION), b_dv


@triton.jit(do_not_specialize=["sizes", "mask", "N", "o_video", "o_text", "tiles", "group", "splits", "B"])
def frame_attention_bwd_kv_kernel(
    q,
    k,
    v,
    text_q,
    text_k,
    text_v,
    do,  # Rows (B, N, H, D): t unused
    dk,  # with splits, Rows (splits*B, ...) of partial sums
    dv,
    text_dk,
    text_dv,
    p_lse,
    p_delta,
    lengths,
    sizes,
    mask,
    N,
    o_video,
    o_text,
    tiles,  # of keys, a sample and head
    group,  # frames whose keys the same queries see
    splits,  # programs that share a tile's queries
    B,
    exponent,
    factor,
    ROW: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FLAT: tl.constexpr,
    TEXT: tl.constexpr,
    TEXT_SEES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    H = sizes.H
    S_q, S_k = sizes.S_q, sizes.S_k
    G = H // R
    i_tile = tl.program_id(0) % tiles
    i_split = tl.program_id(0) // tiles % splits
    i_bg = tl.program_id(0) // tiles // splits
    i_b = (i_bg // G).to(tl.int64)
    i_g = (i_bg % G).to(tl.int64)
    is_text, start, n_rows, n_live, begin, end, n_text = key_tile(
        i_tile, lengths, i_b, sizes, mask, group, BN, TEXT, TEXT_SEES
    )
    o_n = tl.arange(0, BN)
    m_live = o_n < n_live
    b_k = load_tokens(k, text_k, is_text, i_b, i_g, start, m_live, S_k, BN, A, FLAT, TEXT, ROW)  # [BN, W]
    b_v = load_tokens(v, text_v, is_text, i_b, i_g, start, m_live, S_k, BN, A, FLAT, TEXT, ROW)
    b_dk = filled(BN, 0.0, ROW)
    b_dv = filled(BN, 0.0, ROW)
    n_low, n_run, n_txt, n_left = walk(0, begin, end, n_text, BM)
    n_whole = n_run + n_txt
    for i in range(i_split, n_whole * R, splits):
        i_r = i // n_whole if R > 1 else 0
        first, of_text = whole_tile(i - i_r * n_whole, 0, n_run, begin, BM)
        i_h = i_g * R + i_r
        b_dk, b_dv = _to_keys(
            *(b_dk, b_dv, b_k, b_v, q, text_q, do, p_lse, p_delta, of_text, i_b, i_h, first, first),
            *(S_q, H, N, o_video, o_text, exponent),
            *(BM, A, FLAT, TEXT, True, ROW, PRECISION),
        )
    for i in range(i_split, n_left * R, splits):
        i_r = i // n_left if R > 1 else 0
        first, stop, of_text = left_tile(i - i_r * n_left, 0, begin, end, n_text, BM)
        i_h = i_g * R + i_r
        b_dk, b_dv = _to_keys(
            *(b_dk, b_dv, b_k, b_v, q, text_q, do, p_lse, p_delta, of_text, i_b, i_h, first, stop),
            *(S_q, H, N, o_video, o_text, exponent),
            *(BM, A, FLAT, TEXT, False, ROW, PRECISION),
        )
    b_dk = keep(scale(b_dk, factor), m_live[:, None])
    b_dv = keep(b_dv, m_live[:, None])
    m_rows = o_n < n_rows
    i_part = i_split * B + i_b
    store_tokens(dk, text_dk, is_text, i_part, i_g, start, m_rows, S_k, b_dk, BN, A, FLAT, TEXT, ROW)
    store_tokens(dv, text_dv, is_text, i_part, i_g, start, m_rows, S_k, b_dv, BN, A, FLAT, TEXT, ROW)


def _row(D: int) -> Row:
    """One tile above 128 channels: a second one's operands leave no registers for two gradients."""
    return split_row(D) if D <= 128 else Row(D, D, power_of_2(D))


def _group(chunk: int, sink: int, T_k: int) -> int:
    """Frames that share a chunk and are sinks together or not: a sink may end inside a chunk."""
    return min(math.gcd(chunk, sink) if sink else chunk, T_k)


# A kv program walks through all queries that see its keys: with few keys, as text has, they share the walk.
_PROGRAMS = 512


def frame_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    text_gradients: tuple[Tensor, Tensor, Tensor] | None,
    *,
    mask: FrameMask,
    q_start: int,
    lengths: Lengths,
    text_first: bool,
    text_sees: bool,
    factor: float,
) -> None:
    """Fills the gradients of what frame_forward takes, in its shapes; dout as out, any strides; dlse as lse."""
    B, T, S_q, H, D = q.shape
    T_k, S_k, G = k.shape[1:4]
    L = 0 if text is None else text[0].shape[1]
    N = T * S_q + L
    if factor < 0:
        # Scores of negated queries: the gradient of q turns its sign, that of k comes out right.
        q, text = -q, None if text is None else (-text[0], *text[1:])
    text = text and tuple(near(x) for x in text)  # type: ignore[assignment]
    if dout.stride(1) >= NEAR:
        dout = dout.contiguous()
    numbers, _ = mask_numbers(mask, T, T_k, q_start)
    row = _row(D)
    texts, text_grads = text or (None,) * 3, text_gradients or (None,) * 3
    config = pick_for(KEYS, q)
    group = _group(numbers[2], numbers[3], T_k)
    tiles = cdiv(T_k, group) * cdiv(group * S_k, config.n) + cdiv(L, config.n)
    splits = 1 if text is not None else max(min(_PROGRAMS // (B * G * tiles), cdiv(T * S_q, 8 * config.m)), 1)
    dk, dv = gradients[1:]
    if splits > 1:
        dk, dv = (torch.empty(splits * B, *k.shape[1:], dtype=torch.float32, device=q.device) for _ in range(2))
    A = step(q, k, v, dout, *gradients, *(text or ()), *(text_gradients or ()), dk)
    found = [token_rows_of(x, A) for x in (q, k, v, gradients[0], dk, dv)]
    rows_q, rows_k, rows_v, rows_dq, rows_dk, rows_dv = (r for r, _ in found)
    rows_text = [sequence_rows(x, A) for x in texts]
    rows_do = sequence_rows(dout, A)
    delta = torch.empty(B, N, H, dtype=torch.float32, device=q.device)
    BL = max(2048 // power_of_2(D), 1)
    launch(
        row_delta_kernel,
        cdiv(B * N * H, BL),
        q,
        DELTA,
        *(out, rows_do, dlse, delta, N, H, B * N * H),
        ROW=row,
        A=A,
        BN=BL,
    )
    offsets = (N, L if text_first else 0, 0 if text_first else T * S_q)
    sizes, mask_args = frame_sizes(q, k, L), Mask(q_start, *numbers)
    exponent = base_2(factor)
    constants = {
        **{"ROW": row, "A": A, "R": H // G, "FLAT": all(flat for _, flat in found)},
        **{"TEXT": text is not None, "TEXT_SEES": text_sees, "PRECISION": "ieee"},
    }
    launch(
        frame_attention_bwd_kv_kernel,
        B * G * splits * tiles,
        q,
        config,
        *(
            rows_q,
            rows_k,
            rows_v,
            *rows_text,
            rows_do,
            rows_dk,
            rows_dv,
            *(sequence_rows(x, A) for x in text_grads[1:]),
        ),
        *(lse, delta, lengths, sizes, mask_args, *offsets, tiles, group, splits, B, exponent, abs(factor)),
        BM=config.m,
        BN=config.n,
        **constants,
    )
    if splits > 1:
        for whole, parts in zip(gradients[1:], (dk, dv)):
            whole.copy_(parts.unflatten(0, (splits, B)).sum(0))
    config = pick_for(QUERIES, q)
    tiles = query_tiles(T, S_q, L, q_start, numbers[2], config.m)
    launch(
        frame_attention_bwd_q_kernel,
        B * H * tiles,
        q,
        config,
        *(rows_q, rows_k, rows_v, *rows_text, rows_do, rows_dq, sequence_rows(text_grads[0], A)),
        *(lse, delta, dlse, lengths, sizes, mask_args, *offsets, tiles, exponent, factor),
        BM=config.m,
        BN=config.n,
        **constants,
    )
