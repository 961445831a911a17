"""Temporal attention with up to 128 frames a side, backward: one kernel, which reads and writes every row once.

Probabilities are computed again, so that neither the result nor its lse is read: with all keys at hand, delta is the
sum of P dP. The backward of norm and RoPE is fused, but where their gradients sum over heads or positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore.mask import FrameMask
from vdcore.norm import QKNorm
from vdcore.rope import Rope
from vdcore_kernels.core.frames import (
    Frames,
    Side,
    frame_bounds,
    frame_pairs,
    inner,
    load_frames,
    normalized_rotated,
    normalized_rotated_backward,
    query_head,
    row_offsets,
    sequence_block,
    store_frames,
    transposed,
    weighted,
)
from vdcore_kernels.core.launch import ValuesConfig, cdiv, launch, power_of_2, step
from vdcore_kernels.core.tile import LOG2_E, Row, add, column_sum, keep, mul, rows, split_row, store_rows
from vdcore_kernels.qk_norm_rope.backward import live_frames, norm_rope_backward
from vdcore_kernels.qk_norm_rope.forward import norm_rope_forward
from vdcore_kernels.temporal_attention.forward import ONE_SEQUENCE, pick_sequences, temporal_arguments
from vdcore_kernels.temporal_attention.long import temporal_long_backward

BACKWARD = (
    ValuesConfig("interpreter", 4, 1, "several sequences and several programs in a small case", 4096),
    ValuesConfig("interpreter", 8, 1, ONE_SEQUENCE, 16384),
    ValuesConfig("", 4, 1, "predicted: four tensors in and three out of 4,096 values at 115 to 250 registers", 4096),
    ValuesConfig("sm_", 8, 1, ONE_SEQUENCE, 8192),
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


class Heads(NamedTuple):
    """What all query heads of a program share: q's side, gradients in and out, and the numbers of the kernel."""

    q: Any
    do: Any
    dq: Any
    p_dlse: Any
    p_sums: Any
    angles: Any
    S: Any
    G: Any
    sm_scale: Any


@triton.jit
def _store_gradient(b_g, dx, side, i, heads, at, o_t, m_t, SHAPE: tl.constexpr):
    """Gradient of the raw rows of q or k from that after norm and RoPE; and what they add to the i-th of the sums."""
    ROW: tl.constexpr = SHAPE.ROW
    if SHAPE.NR.KIND > 0 or SHAPE.NR.STYLE > 0:
        b_g, b_h, b_b = normalized_rotated_backward(b_g, side, heads.angles, at, o_t, m_t, SHAPE)
        if heads.p_sums is not None:
            _store_sums(heads.p_sums, i, SHAPE.R + 1, b_b, b_h, side.norm, ROW)
    store_frames(dx, at, o_t, side.T, b_g, SHAPE.A, ROW)


@triton.jit
def _one_head(i_r, b_k, b_v, heads, pairs, at, SHAPE: tl.constexpr):
    """Writes dq of the i_r-th query head of every sequence; returns what it adds to dk and dv, [BP, BK, W].

    pairs: what frame_pairs returns.
    """
    ROW: tl.constexpr = SHAPE.ROW
    V: tl.constexpr = SHAPE.V
    m_t, m_f, seen = pairs
    o_t = tl.arange(0, SHAPE.BQ)
    head = query_head(at, i_r, SHAPE.R)
    b_q = load_frames(heads.q.x, head, o_t, m_t, SHAPE.A, ROW)
    b_q = normalized_rotated(b_q, heads.q, heads.angles, head, o_t, m_t, heads.S, SHAPE)
    b_do = load_frames(heads.do, head, o_t, m_t, SHAPE.A, V)
    b_s = tl.where(seen, inner(b_q, b_k) * (heads.sm_scale * LOG2_E), -float("inf"))  # [BP, BQ, BK]
    b_m = tl.max(b_s, 2, keep_dims=True)
    b_p = tl.exp2(b_s - tl.where(b_m == -float("inf"), 0.0, b_m))
    b_l = tl.sum(b_p, 2, keep_dims=True)
    b_p = tl.where(seen, b_p * tl.where(b_l == 0.0, 0.0, 1 / b_l), 0.0)
    seeing = tl.permute(seen, (0, 2, 1))
    b_dv = weighted(transposed(b_p).to(b_do[0].dtype), b_do, seeing, SHAPE.MASKED)
    b_ds = tl.where(seen, inner(b_do, b_v), 0.0)
    b_delta = tl.sum(b_p * b_ds, 2, keep_dims=True)
    if heads.p_dlse is not None:
        o_row = row_offsets(head, o_t, heads.q.T, heads.S, heads.G * SHAPE.R)  # [BP, BQ]
        b_dlse = tl.load(heads.p_dlse + o_row, mask=at.m[:, None] & m_t[None, :], other=0.0)
        b_delta -= b_dlse[:, :, None]
    b_ds = tl.where(seen, b_p * (b_ds - b_delta) * heads.sm_scale, 0.0)
    b_g = keep(weighted(b_ds, b_k, seen, SHAPE.MASKED), m_t[None, :, None])
    _store_gradient(b_g, heads.dq, heads.q, i_r, heads, head, o_t, m_t, SHAPE)
    return weighted(transposed(b_ds).to(b_q[0].dtype), b_q, seeing, SHAPE.MASKED), b_dv


@triton.jit(do_not_specialize=[*Frames._fields, "S", "G"])
def temporal_attention_bwd_kernel(
    q,
    k,
    v,
    do,
    dq,
    dk,
    dv,
    p_dlse,
    p_len,
    q_norm,
    k_norm,
    angles,
    p_sums,
    T,
    T_k,
    q_start,
    past,
    future,
    chunk,
    sink,
    S,
    G,
    sm_scale,
    SHAPE: tl.constexpr,
):
    """One program: all gradients of BP sequences (position, key/value head), R query heads each.

    q, do, dq: Rows (B, T, S, G*R, D). k, v, dk, dv: Rows (B, T_k, S, G, D). p_dlse: (B, T, S, G*R), or None. p_len:
    (B,), or None. p_sums: (programs, R + 1, 2, D), float32: gradients of the norm's weight and bias of q, per query
    head, and, last, of k; or None.
    """
    ROW: tl.constexpr = SHAPE.ROW
    V: tl.constexpr = SHAPE.V
    R: tl.constexpr = SHAPE.R
    frames = Frames(T, T_k, q_start, past, future, chunk, sink)
    o_f = tl.arange(0, SHAPE.BK)
    at = sequence_block(tl.program_id(0), S, G, SHAPE.BP)
    pairs = frame_pairs(p_len, at.b, frames, tl.arange(0, SHAPE.BQ), o_f, SHAPE.MASKED)
    m_f = pairs[1]
    of_q, of_k = Side(q, q_norm, q_start, T), Side(k, k_norm, 0, T_k)
    heads = Heads(of_q, do, dq, p_dlse, p_sums, angles, S=S, G=G, sm_scale=sm_scale)
    b_v = load_frames(v, at, o_f, m_f, SHAPE.A, V)  # [BP, BK, W]
    b_k = load_frames(k, at, o_f, m_f, SHAPE.A, ROW)
    b_k = normalized_rotated(b_k, of_k, angles, at, o_f, m_f, S, SHAPE)
    b_dk, b_dv = _one_head(0, b_k, b_v, heads, pairs, at, SHAPE)
    for i_r in range(1, R):
        b_k_more, b_v_more = _one_head(i_r, b_k, b_v, heads, pairs, at, SHAPE)
        b_dk, b_dv = add(b_dk, b_k_more), add(b_dv, b_v_more)
    store_frames(dv, at, o_f, T_k, b_dv, SHAPE.A, V)
    _store_gradient(b_dk, dk, of_k, R, heads, at, o_f, m_f, SHAPE)


def _fused_row(D: int, rope: Rope | None) -> Row:
    """Rows under the backward of norm and RoPE: one tile, unless "half" pairs need two, where 72 is 64 + 16.

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
    sm_scale: float,
    norm: QKNorm | None,
    rope: Rope | None,
) -> dict[str, Tensor]:
    """Fills the gradients of q, k and v, which may be slices of a packed one, their heads contiguous.

    Returns the wanted among ``"q_weight"``, ``"k_weight"``, ``"q_bias"``, ``"k_bias"``, ``"cos"``, ``"sin"``, float32.
    """
    T, T_k, D = q.shape[1], k.shape[1], q.shape[4]
    _, masked = frame_bounds(mask, T, T_k, q_start)
    frames: dict[str, Any] = {"mask": mask, "q_start": q_start, "lengths": lengths}
    moves = norm is not None or rope is not None
    shared = 2 if q.shape[3] > k.shape[3] else 1  # heads that share keys: two more sums
    # The backward of norm and RoPE is fused, but for what sums over heads or positions, and for long sequences.
    if moves and not wanted & {"cos", "sin"} and (norm is None or norm.over == "head"):
        row = _fused_row(D, rope)
        picked = pick_sequences(BACKWARD, q, T, T_k, row, 2 * shared)
        if picked is not None:
            of_norm = wanted & {"q_weight", "k_weight", "q_bias", "k_bias"}
            moving: dict[str, Any] = {**frames, "norm": norm, "rope": rope}
            return _short_backward(
                q, k, v, dout, dlse, gradients, of_norm, picked, row=row, sm_scale=sm_scale, **moving
            )
    q_seen, k_seen, (dq, dk, dv) = q, k, gradients
    if moves:
        q_seen, k_seen = (norm_rope_forward(x, norm, n, rope, i) for n, x, i in (("q", q, q_start), ("k", k, 0)))
        dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    row = split_row(D)
    picked = pick_sequences(BACKWARD, q, T, T_k, row, (2 if masked else 1) * shared)
    grads = (dq, dk, dv)
    if picked is None:
        temporal_long_backward(q_seen, k_seen, v, out, lse, dout, dlse, grads, sm_scale=sm_scale, **frames)
    else:
        nothing: frozenset[str] = frozenset()
        _short_backward(q_seen, k_seen, v, dout, dlse, grads, nothing, picked, row=row, sm_scale=sm_scale, **frames)
    found: dict[str, Tensor] = {}
    if moves:
        live = live_frames(q, k, **frames)
        for role, x, dy, dx, start, alive in (
            ("q", q, dq, gradients[0], q_start, live[0]),
            ("k", k, dk, gradients[1], 0, live[1]),
        ):
            names = {"weight": f"{role}_weight", "bias": f"{role}_bias", "cos": "cos", "sin": "sin"}
            asked = frozenset(short for short, name in names.items() if name in wanted)
            part = norm_rope_backward(x, dy, norm, role, rope, start, asked, dx=dx, live=alive)
            for short in sorted(asked & part.keys()):
                name = names[short]
                found[name] = found[name] + part[short] if name in found else part[short]
    return found


def _short_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    wanted: frozenset[str],
    picked: tuple[ValuesConfig, int],
    *,
    row: Row,
    sm_scale: float,
    **arguments: Any,
) -> dict[str, Tensor]:
    """All frames in one pass; returns the wanted gradients of the norm's weights and biases, by their names."""
    config, BP = picked
    G = k.shape[3]
    programs = q.shape[0] * cdiv(q.shape[2] * G, BP)
    sums = None
    if wanted:
        sums = torch.empty(programs, q.shape[3] // G + 1, 2, q.shape[4], dtype=torch.float32, device=q.device)
    A = step(q, k, v, dout, *gradients)
    dq, dk, dv = (rows(x, A) for x in gradients)
    launch(
        temporal_attention_bwd_kernel,
        programs,
        like=q,
        config=config,
        q=rows(q, A),
        k=rows(k, A),
        v=rows(v, A),
        do=rows(dout, A),
        dq=dq,
        dk=dk,
        dv=dv,
        p_dlse=dlse,
        p_sums=sums,
        sm_scale=sm_scale,
        **temporal_arguments(q, k, row=row, A=A, BP=BP, **arguments),
    )
    if sums is None:
        return {}
    total = sums.sum(0)
    of_q, of_k = total[:-1].sum(0), total[-1]
    names = {"q_weight": of_q[0], "k_weight": of_k[0], "q_bias": of_q[1], "k_bias": of_k[1]}
    return {name: x for name, x in names.items() if name in wanted}
