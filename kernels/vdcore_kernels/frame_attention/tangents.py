"""Spatial, video and cross attention, forward-mode derivatives: of out and lse, from those of q, k and v.

With P the probabilities and E = scale (dq k^T + q dk^T) the tangent of the scores, dlse = sum(P E) along a row, and
dout = (P E) v + P dv - dlse out (Lu and Song 2025, appendix F). P comes back from forward's lse: one pass over the
keys, one accumulator, nothing is rescaled. 6 D FLOP per visible pair with the tangent of q alone, 10 D with all three,
beside forward's 4 D.

E may have a mean much larger than its deviations, which cancels in dout only up to rounding: so every row's E is taken
less what the first keys come to, which dlse gets back at the end. What products round of P E goes into the sum that
weighs out, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.frames import Frames
from vdcore_kernels.core.launch import launch
from vdcore_kernels.core.tile import LOG2_E, add, filled, keep, load_rows, scale, split_row, store_rows, to
from vdcore_kernels.core.tokens import (
    NO_ROWS,
    Pair,
    Sizes,
    first_keys,
    key_head,
    layout_of,
    left_tile,
    load_keys,
    load_tokens,
    near,
    power,
    query_tile,
    result_row,
    rows_times,
    times_rows,
    walk,
    whole_tile,
)
from vdcore_kernels.frame_attention.problem import FLOAT32, SMALL, FrameConfig, FrameProblem, pick_for

Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_TANGENTS: Tangents = (None, None, None)

_NVIDIA = "sm_8|sm_9|sm_10|sm_11|sm_12"
TANGENTS = (
    FrameConfig("interpreter", 4, 1, "whole and partial tiles in a small case", 32, 32, 256, 4),
    FrameConfig("sm_9|sm_10", 8, 2, "two warpgroups of 64 rows' scores and their tangents", 128, 64, 64),
    FrameConfig("sm_9|sm_10", 8, 3, "64 keys spill; four tiles of 32 keys in three stages, 160 KB", 128, 32, 128),
    FrameConfig(SMALL, 4, 2, "64 keys would spill", 64, 32, 64),
    FrameConfig("sm_80", 4, 1, "two tiles of 72 channels: of fewer queries warps repeat products", 64, 32, 80),
    FrameConfig("sm_11|sm_12", 8, 2, "64 queries spill, of two tiles of 72 channels 16 bytes", 32, 32, 96),
    FrameConfig("sm_8", 4, 1, "two tiles of 96 channels: 32 keys spill", 64, 16, 96),
    FrameConfig(SMALL, 8, 1, "64 queries spill; 1.6 instructions a pair for 2.8 of 32 keys, repeated", 32, 64, 128),
    FrameConfig(_NVIDIA, 8, 1, "160 channels: 32 keys spill", 64, 16, 160),
    FrameConfig(_NVIDIA, 8, 1, "256 channels of queries and their tangents: 32 queries spill", 16, 32, 256),
    FrameConfig("gfx", 4, 1, "64 KB of shared memory", 32, 32, 256),
    FrameConfig("", 8, 1, FLOAT32, 16, 16, 256, 4),
)
# float32 is multiplied on the plain units, where a thread holds its operands' channels: 104 of them spill.
MAX_FLOAT32 = 96


class Queries(NamedTuple):
    """A tile of queries [BM, W] and their tangents, or 0.0; lse, in units of the scores, and what E is less [BM]."""

    q: Any
    dq: Any
    lse: Any
    shift: Any


@triton.jit
def _load_queries(q, dq, p_lse, at, m, row, sizes, exponent, TILE: tl.constexpr):
    b_dq = 0.0
    if dq.video.p is not None:
        b_dq = load_tokens(dq, at, m, sizes.S_q, TILE.BM, TILE)
    b_lse = tl.load(p_lse + row + tl.arange(0, TILE.BM) * sizes.H, mask=m, other=0.0)
    b_lse = tl.where(b_lse == -float("inf"), 0.0, b_lse)  # all scores -inf: 2 ** (-inf - 0) is 0, not NaN
    return load_tokens(q, at, m, sizes.S_q, TILE.BM, TILE), b_dq, b_lse * (LOG2_E / exponent)


@triton.jit
def _mean_tangent(b_q, b_dq, k, dq, dk, at, runs, S, sm_scale, N: tl.constexpr, TILE: tl.constexpr):
    """The mean [BM] of the scores' tangents over the first N keys of the longest run."""
    at, count = first_keys(at, runs, N)
    m = tl.arange(0, N) < count
    b_e = tl.full([TILE.BM, N], 0.0, tl.float32)
    if dq.video.p is not None:
        b_e += times_rows(b_dq, load_tokens(k, at, m, S, N, TILE))
    if dk.video.p is not None:
        b_e += times_rows(b_q, load_tokens(dk, at, m, S, N, TILE))
    return tl.sum(b_e, 1) * (sm_scale / tl.maximum(count, 1))


@triton.jit
def _push(state, queries, sides, at, stop, S, exponent, sm_scale, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Sums of P (E - shift) v + P dv [BM, W] and, exactly and as products round it, of P (E - shift) [BM], after keys
    [at.start, stop)."""
    b_o, b_sum, b_terms = state
    k, v, dq, dk, dv = sides
    b_k, b_v, m = load_keys(k, v, at, stop, S, WHOLE, TILE)  # [BN, W]
    b_p = power(times_rows(queries.q, b_k), queries.lse[:, None], exponent)  # [BM, BN]
    if not WHOLE:
        b_p = tl.where(m[None, :], b_p, 0.0)
    if dq.video.p is not None or dk.video.p is not None:
        b_e = tl.full([TILE.BM, TILE.BN], 0.0, tl.float32)
        if dq.video.p is not None:
            b_e += times_rows(queries.dq, b_k)
        if dk.video.p is not None:
            b_e += times_rows(queries.q, load_tokens(dk, at, m, S, TILE.BN, TILE))
        b_pe = b_p * (b_e * sm_scale - queries.shift[:, None])
        b_sum += tl.sum(b_pe, 1)
        b_pe = b_pe.to(b_v[0].dtype)
        b_terms += tl.sum(b_pe.to(tl.float32), 1)
        b_o = rows_times(b_pe, b_v, b_o)
    if dv.video.p is not None:
        b_dv = load_tokens(dv, at, m, S, TILE.BN, TILE)
        b_o = rows_times(b_p.to(b_dv[0].dtype), b_dv, b_o)
    return b_o, b_sum, b_terms


@triton.jit(do_not_specialize=[*Sizes._fields, *Frames._fields, "tiles"])
def frame_attention_jvp_kernel(
    q,
    k,
    v,
    dq,
    dk,
    dv,
    p_o,
    p_lse,
    p_do,
    p_dlse,
    lengths,
    S_q,
    S_k,
    L,
    H,
    T,
    T_k,
    q_start,
    past,
    future,
    chunk,
    sink,
    group,
    clean,
    shots,
    tiles,
    exponent,
    sm_scale,
    TILE: tl.constexpr,
):
    """One program: a tile of BM queries (video or text tokens) of one sample and head, and all keys that they see.

    dq, dk, dv: as q, k, v, or with pointers that are None. p_o, p_do: (B, N, H, D), contiguous. p_lse, p_dlse: (B, N,
    H). sm_scale: the size of the scale of the scores. The others as frame_attention_fwd_kernel's.
    """
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    ROW: tl.constexpr = TILE.ROW
    sizes, frames = Sizes(S_q, S_k, L, H), Frames(T, T_k, q_start, past, future, chunk, sink, group, clean, shots)
    at, n_rows, n_live, runs = query_tile(tiles, lengths, sizes, frames, TILE)
    o_n = tl.arange(0, BM)
    m_live = o_n < n_live
    row = result_row(at, sizes, frames, TILE)
    b_q, b_dq, b_lse = _load_queries(q, dq, p_lse, at, m_live, row, sizes, exponent, TILE)
    of_keys, steps = key_head(at, TILE), walk(runs, BN)
    b_shift = _mean_tangent(b_q, b_dq, k, dq, dk, of_keys, runs, S_k, sm_scale, N=16, TILE=TILE)
    queries = Queries(b_q, b_dq, b_lse, b_shift)
    sides = (k, v, dq, dk, dv)
    state = (filled(BM, 0.0, ROW), tl.full([BM], 0.0, tl.float32), tl.full([BM], 0.0, tl.float32))
    for i in range(steps.n_whole):
        at_k = whole_tile(i, of_keys, steps, BN)
        state = _push(state, queries, sides, at_k, at_k.start, S_k, exponent, sm_scale, WHOLE=True, TILE=TILE)
    for i in tl.range(steps.n_left, num_stages=1):
        at_k, stop = left_tile(i, of_keys, steps, BN)
        state = _push(state, queries, sides, at_k, stop, S_k, exponent, sm_scale, WHOLE=False, TILE=TILE)
    b_o, b_sum, b_terms = state
    m_seeing = m_live & (steps.n_whole + steps.n_left > 0)
    m_rows = o_n < n_rows
    if dq.video.p is not None or dk.video.p is not None:
        out = to(load_rows(p_o + row * ROW.D, o_n * H * ROW.D, m_seeing, ROW), tl.float32)
        b_o = add(b_o, scale(out, -b_terms[:, None]))
    store_rows(p_do + row * ROW.D, o_n * H * ROW.D, m_rows, keep(b_o, m_seeing[:, None]), ROW)
    tl.store(p_dlse + row + o_n * H, tl.where(m_seeing, b_sum + queries.shift, 0.0), mask=m_rows)


def _as_like(dx: Tensor | None, x: Tensor, wanted: bool) -> Tensor | None:
    """A tangent in x's dtype, of unit stride; 0 where it is wanted and not given, in the memory of one row."""
    if not wanted:
        return None
    if dx is None:
        return x.new_zeros(x.shape[-1]).expand(x.shape)
    dx = dx.to(x.dtype)
    return dx if dx.stride(-1) == 1 or dx.shape[-1] == 1 else dx.contiguous()


def _filled_in(given: tuple[Tangents, Tangents], problem: FrameProblem) -> tuple[Tangents, Tangents]:
    """Tangents that either the video or the text has, both have; of scores that take the size of the scale."""
    p, (video, text) = problem, given
    wanted = [any(side[i] is not None for side in given) for i in range(3)]
    dq, dk, dv = map(_as_like, video, (p.q, p.k, p.v), wanted)
    text_dq, text_dk, text_dv = NO_TANGENTS
    if p.text is not None:
        text_dq, text_dk, text_dv = (None if dx is None else near(dx) for dx in map(_as_like, text, p.text, wanted))
    if p.sm_scale < 0:
        dq, text_dq = (None if dx is None else -dx for dx in (dq, text_dq))
    return (dq, dk, dv), (text_dq, text_dk, text_dv)


def frame_tangents(
    problem: FrameProblem,
    out: Tensor,
    lse: Tensor,
    given: tuple[Tangents, Tangents],
    dout: Tensor,
    dlse: Tensor,
) -> None:
    """Fills the tangents of frame_forward's out and lse.

    Args:
        given: tangents of q, k and v, and of the text's, each or None.
    """
    moved, moved_text = _filled_in(given, problem)
    p = problem.with_positive_scores()
    config = pick_for(TANGENTS, p.q)
    there = [(x, of_text) for x, of_text in zip(moved, moved_text) if x is not None]
    text = None if p.text is None else (*p.text, *(of_text for _, of_text in there))
    layout = layout_of((p.q, p.k, p.v, *(x for x, _ in there)), text)  # type: ignore[arg-type]
    pairs = list(layout.pairs[3:])
    nothing = Pair(NO_ROWS, NO_ROWS)
    named = {name: nothing if x is None else pairs.pop(0) for name, x in zip(("dq", "dk", "dv"), moved)}
    programs, tiles = p.query_programs(config.m)
    launch(
        frame_attention_jvp_kernel,
        programs,
        like=p.q,
        config=config,
        q=layout.pairs[0],
        k=layout.pairs[1],
        v=layout.pairs[2],
        **named,
        p_o=out,
        p_lse=lse,
        p_do=dout,
        p_dlse=dlse,
        tiles=tiles,
        sm_scale=abs(p.sm_scale),
        TILE=p.constants(layout, config, split_row(p.q.shape[4])),
        **p.numbers,
    )
