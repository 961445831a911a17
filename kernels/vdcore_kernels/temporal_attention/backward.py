"""Temporal attention with up to 128 frames a side, backward: one kernel, which reads and writes every row once.

Probabilities are computed again, so that neither the result nor its lse is read: with all keys at hand, delta is the
sum of P dP. Norm and rope are taken back in registers too, but where their gradients sum over heads or positions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope
from vdcore_kernels.core.frames import live_frames, mask_numbers
from vdcore_kernels.core.launch import cdiv, launch, power_of_2, step
from vdcore_kernels.core.products import inner, transposed, weighted
from vdcore_kernels.core.sequences import (
    frame_pairs,
    frame_rows,
    gradient_back,
    line_block,
    normed_turned,
    store_frames,
)
from vdcore_kernels.core.tile import (
    Row,
    add,
    column_sum,
    keep,
    mul,
    norm_arguments,
    rope_arguments,
    rows,
    split_row,
    store_rows,
)
from vdcore_kernels.qk_norm_rope.forward import norm_rope_backward, norm_rope_forward
from vdcore_kernels.temporal_attention.forward import LINE, LOG2_E, TemporalConfig, pick_lines, side, turns_by_line
from vdcore_kernels.temporal_attention.long import temporal_long_backward

BACKWARD = (
    TemporalConfig("interpreter", 4, 1, "several lines and several programs in a small case", 4096),
    TemporalConfig("interpreter", 8, 1, LINE, 16384),
    TemporalConfig("", 4, 1, "predicted: four tensors in and three out of 4,096 values at 115 to 250 registers", 4096),
    TemporalConfig("sm_", 8, 1, LINE, 8192),
)


@triton.jit
def _all_rows(x):
    """Sums [P, N, W] -> [1, W]."""
    if len(x) > 1:
        return column_sum((tl.sum(x[0], 0), tl.sum(x[1], 0)))
    else:
        return column_sum((tl.sum(x[0], 0),))


@triton.jit
def _store_sums(p_sums, i, n, b_b, b_h, norm, ROW: tl.constexpr):
    """What a program's rows add to the gradients of the norm's weight and bias."""
    o_p = ((tl.program_id(0).to(tl.int64) * n + i) * 2) * ROW.D + tl.arange(0, 1)
    store_rows(p_sums, o_p, o_p >= 0, _all_rows(mul(b_b, b_h)), ROW)
    if norm.b is not None:
        store_rows(p_sums, o_p + ROW.D, o_p >= 0, _all_rows(b_b), ROW)


@triton.jit
def _one_head(
    i_r,
    b_k,  # [BP, BK, W]
    b_v,
    q,
    do,
    dq,
    p_dlse,
    q_norm,
    angles,
    p_sums,
    pairs,  # what frame_pairs says
    lines,  # what line_block says
    frames,
    S,
    G,
    factor,
    ROW: tl.constexpr,
    V: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    BQ: tl.constexpr,
    MASKED: tl.constexpr,
    LINES: tl.constexpr,
    KIND: tl.constexpr,
    STYLE: tl.constexpr,
    R2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes dq of the i_r-th query head of every line; returns what it adds to dk and dv, [BP, BK, W]."""
    T, q_start = frames[0], frames[2]
    m_t, m_f, seen = pairs
    i_b, o_s, o_g, m_n = lines
    o_t = tl.arange(0, BQ)
    o_h = o_g * R + i_r
    b_q = normed_turned(
        frame_rows(q, i_b, o_s, o_h, o_t, m_n, m_t, A, ROW),
        *(q_norm, None, angles, q_start, i_b, T, S, o_s, o_h, o_t, m_n, m_t),
        *(LINES, ROW, KIND, 0, STYLE, R2),
    )
    b_do = frame_rows(do, i_b, o_s, o_h, o_t, m_n, m_t, A, V)
    b_s = tl.where(seen, inner(b_q, b_k, PRECISION) * (factor * LOG2_E), -float("inf"))  # [BP, BQ, BK]
    b_m = tl.max(b_s, 2, keep_dims=True)
    b_p = tl.exp2(b_s - tl.where(b_m == -float("inf"), 0.0, b_m))
    b_l = tl.sum(b_p, 2, keep_dims=True)
    b_p = tl.where(seen, b_p * tl.where(b_l == 0.0, 0.0, 1 / b_l), 0.0)
    seeing = tl.permute(seen, (0, 2, 1))
    b_dv = weighted(transposed(b_p).to(b_do[0].dtype), b_do, seeing, MASKED, PRECISION)
    b_ds = tl.where(seen, inner(b_do, b_v, PRECISION), 0.0)
    b_delta = tl.sum(b_p * b_ds, 2, keep_dims=True)
    if p_dlse is not None:
        o_row = (((i_b * T + o_t)[None, :] * S + o_s[:, None]) * G * R) + o_h[:, None]  # [BP, BQ]
        b_dlse = tl.load(p_dlse + o_row, mask=m_n[:, None] & m_t[None, :], other=0.0)
        b_delta -= b_dlse[:, :, None]
    b_ds = tl.where(seen, b_p * (b_ds - b_delta) * factor, 0.0)
    b_g = keep(weighted(b_ds, b_k, seen, MASKED, PRECISION), m_t[None, :, None])
    if KIND > 0 or STYLE > 0:
        b_g, b_h, b_b = gradient_back(
            *(b_g, q, q_norm, angles, q_start, i_b, o_s, o_h, o_t, m_n, m_t),
            *(LINES, A, ROW, KIND, STYLE, R2),
        )
        if p_sums is not None:
            _store_sums(p_sums, i_r, R + 1, b_b, b_h, q_norm, ROW)
    store_frames(dq, i_b, o_s, o_h, o_t, m_n, T, b_g, A, ROW)
    return weighted(transposed(b_ds).to(b_q[0].dtype), b_q, seeing, MASKED, PRECISION), b_dv


@triton.jit(do_not_specialize=["frames", "S", "G"])
def temporal_attention_bwd_kernel(
    q,  # Rows (B, T, S, G*R, D)
    k,  # Rows (B, T_k, S, G, D)
    v,
    do,
    dq,
    dk,
    dv,
    p_dlse,  # (B, T, S, G*R), or None
    p_len,
    q_norm,
    k_norm,
    angles,
    p_sums,  # (programs, R + 1, 2, D), float32: for the norm's weight and bias of q and, last, of k; or None
    frames,
    S,
    G,
    factor,  # scale of the scores
    ROW: tl.constexpr,
    V: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    MASKED: tl.constexpr,
    LINES: tl.constexpr,
    KIND: tl.constexpr,
    STYLE: tl.constexpr,
    R2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T_k = frames[1]
    o_t = tl.arange(0, BQ)
    o_f = tl.arange(0, BK)
    i_b, o_s, o_g, m_n = line_block(tl.program_id(0), S, G, BP)
    m_t, m_f, seen = frame_pairs(p_len, i_b, frames, o_t, o_f, MASKED)
    b_v = frame_rows(v, i_b, o_s, o_g, o_f, m_n, m_f, A, V)  # [BP, BK, W]
    b_k = normed_turned(
        frame_rows(k, i_b, o_s, o_g, o_f, m_n, m_f, A, ROW),
        *(k_norm, None, angles, 0, i_b, T_k, S, o_s, o_g, o_f, m_n, m_f),
        *(LINES, ROW, KIND, 0, STYLE, R2),
    )
    pairs = (m_t, m_f, seen)
    lines = (i_b, o_s, o_g, m_n)
    b_dk, b_dv = _one_head(
        *(0, b_k, b_v, q, do, dq, p_dlse, q_norm, angles, p_sums, pairs, lines, frames, S, G, factor),
        *(ROW, V, A, R, BQ, MASKED, LINES, KIND, STYLE, R2, PRECISION),
    )
    for i_r in range(1, R):
        b_k_more, b_v_more = _one_head(
            *(i_r, b_k, b_v, q, do, dq, p_dlse, q_norm, angles, p_sums, pairs, lines, frames, S, G, factor),
            *(ROW, V, A, R, BQ, MASKED, LINES, KIND, STYLE, R2, PRECISION),
        )
        b_dk, b_dv = add(b_dk, b_k_more), add(b_dv, b_v_more)
    store_frames(dv, i_b, o_s, o_g, o_f, m_n, T_k, b_dv, A, V)
    if KIND > 0 or STYLE > 0:
        b_dk, b_h, b_b = gradient_back(
            *(b_dk, k, k_norm, angles, 0, i_b, o_s, o_g, o_f, m_n, m_f),
            *(LINES, A, ROW, KIND, STYLE, R2),
        )
        if p_sums is not None:
            _store_sums(p_sums, R, R + 1, b_b, b_h, k_norm, ROW)
    store_frames(dk, i_b, o_s, o_g, o_f, m_n, T_k, b_dk, A, ROW)


def _moved_row(D: int, rope: Rope | None) -> Row:
    """Rows that are normed or turned and taken back: one tile, unless turning needs two, where 72 is 64 + 16.

    Found by compiling: a narrow second tile takes more registers than the places it saves.
    """
    return split_row(D, rope) if rope is not None and rope.style == "half" else Row(D, D, max(power_of_2(D), 16))


def temporal_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    wanted: frozenset[str],
    *,
    mask: FrameMask,
    q_start: int,
    lengths: Tensor | None,
    scale: float,
    norm: QKNorm | None,
    rope: Rope | None,
) -> dict[str, Tensor]:
    """Fills the gradients of q, k and v, which may be slices of a packed one, their heads contiguous.

    Returns the wanted among ``"q_weight"``, ``"k_weight"``, ``"q_bias"``, ``"k_bias"``, ``"cos"``, ``"sin"``, float32.
    """
    T, T_k, D = q.shape[1], k.shape[1], q.shape[4]
    _, masked = mask_numbers(mask, T, T_k, q_start)
    frames: dict[str, Any] = {"mask": mask, "q_start": q_start, "lengths": lengths}
    moves = norm is not None or rope is not None
    dq, dk, dv = gradients
    # Norm and rope are taken back in registers, but for what sums over heads or positions, and for long lines.
    picked = None
    shared = 2 if q.shape[3] > k.shape[3] else 1  # heads that share keys: two more sums
    if moves and not wanted & {"cos", "sin"} and (norm is None or norm.over == "head"):
        picked = pick_lines(BACKWARD, q, T, T_k, _moved_row(D, rope), 2 * shared)
    back = picked is not None
    q_seen, k_seen = q, k
    if moves and not back:
        q_seen, k_seen = (norm_rope_forward(x, norm, n, rope, i) for n, x, i in (("q", q, q_start), ("k", k, 0)))
        dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if not back:
        picked = pick_lines(BACKWARD, q, T, T_k, split_row(D), (2 if masked else 1) * shared)
    sums = None
    if picked is None:
        temporal_long_backward(q_seen, k_seen, v, out, lse, dout, dlse, dq, dk, dv, scale=scale, **frames)
    else:
        learns = back and bool(wanted & {"q_weight", "k_weight", "q_bias", "k_bias"})
        moved = (norm, rope) if back else (None, None)
        sums = _short_backward(q_seen, k_seen, v, dout, dlse, dq, dk, dv, picked, learns, scale, *moved, frames)
    found: dict[str, Tensor] = {}
    if sums is not None:
        total = sums.sum(0)
        of_q, of_k = total[:-1].sum(0), total[-1]
        names = {"q_weight": of_q[0], "k_weight": of_k[0], "q_bias": of_q[1], "k_bias": of_k[1]}
        found = {name: x for name, x in names.items() if name in wanted}
    if moves and not back:
        live = live_frames(q, k, **frames)
        for role, x, dy, dx, start, alive in (
            ("q", q, dq, gradients[0], q_start, live[0]),
            ("k", k, dk, gradients[1], 0, live[1]),
        ):
            behind = {"weight": f"{role}_weight", "bias": f"{role}_bias", "cos": "cos", "sin": "sin"}
            asked = frozenset(short for short, name in behind.items() if name in wanted)
            part = norm_rope_backward(x, dy, norm, role, rope, start, asked, dx=dx, live=alive)
            for short in sorted(asked & part.keys()):
                name = behind[short]
                found[name] = found[name] + part[short] if name in found else part[short]
    return found


def _short_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    picked: tuple[TemporalConfig, int],
    sums: bool,
    scale: float,
    norm: QKNorm | None,
    rope: Rope | None,
    frames: dict[str, Any],
) -> Tensor | None:
    """All frames in one pass; returns partial sums ``(programs, R + 1, 2, D)`` of the norm's gradients, if wanted."""
    B, T, S, H, D = q.shape
    T_k, G = k.shape[1], k.shape[3]
    row = split_row(D) if norm is None and rope is None else _moved_row(D, rope)
    config, BP = picked
    numbers, masked = mask_numbers(frames["mask"], T, T_k, frames["q_start"])
    A = step(q, k, v, dout, dq, dk, dv)
    q_norm, norm_constants = norm_arguments(norm, "q")
    k_norm, _ = norm_arguments(norm, "k")
    angles, rope_constants = rope_arguments(rope)
    programs = B * cdiv(S * G, BP)
    partial = torch.empty(programs, H // G + 1, 2, D, dtype=torch.float32, device=q.device) if sums else None
    launch(
        temporal_attention_bwd_kernel,
        programs,
        q,
        config,
        *(rows(x, A) for x in (q, k, v, dout, dq, dk, dv)),
        *(dlse, frames["lengths"], q_norm, k_norm, angles, partial),
        *((T, T_k, frames["q_start"], *numbers), S, G, scale),
        ROW=row,
        V=split_row(D),
        A=A,
        R=H // G,
        BP=BP,
        BQ=side(T),
        BK=side(T_k),
        MASKED=masked,
        LINES=turns_by_line(rope),
        PRECISION="ieee",
        KIND=norm_constants["KIND"],
        **rope_constants,
    )
    return partial
