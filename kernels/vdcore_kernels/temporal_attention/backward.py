"""Temporal attention with up to 128 frames a side, backward: one kernel, which reads and writes every row once.

Probabilities are computed again, so that neither the result nor its lse is read: with all keys at hand, delta is the
sum of P dP. Norm and RoPE have passes of their own. Where a gate weighs the result beside another one, the same pass
gives its gradient and the other one's: dout and the scores are at hand, and the result need not be there.
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
from vdcore_kernels.core.frames import (
    Frames,
    finite_rows,
    frame_pairs,
    inner,
    load_dlse,
    load_frames,
    poisoned,
    query_head,
    row_offsets,
    sequence_block,
    store_frames,
    transposed,
    weighted,
)
from vdcore_kernels.core.gate import (
    Gate,
    Share,
    load_mixed,
    rest_of,
    store_channel_gradients,
    store_row_gradients,
)
from vdcore_kernels.core.launch import ValuesConfig, arch_of, cdiv, launch
from vdcore_kernels.core.tile import (
    LOG2_E,
    add,
    aligned_rows,
    materialize_before_dot,
    mul,
    split_row,
    store_rows,
    to,
    zeros,
)
from vdcore_kernels.qk_norm_rope.backward import live_frames, norm_rope_backward
from vdcore_kernels.qk_norm_rope.forward import norm_rope_forward
from vdcore_kernels.temporal_attention.forward import ONE_SEQUENCE, pick_sequences, temporal_arguments
from vdcore_kernels.temporal_attention.long import temporal_long_backward

BACKWARD = (
    ValuesConfig("interpreter", 4, 1, "several sequences and several programs in a small case", 4096),
    ValuesConfig("interpreter", 8, 1, ONE_SEQUENCE, 16384),
    ValuesConfig("", 2, 1, "2,560 values: 22 loads of 16 bytes a thread, before the first barrier", 2560),
    ValuesConfig("", 4, 1, ONE_SEQUENCE, 4096),
    ValuesConfig("sm_", 8, 1, ONE_SEQUENCE, 8192),
)


@triton.jit
def _flagged(b_s, flag, seen, hidden, MASKED: tl.constexpr):
    """Products [BP, BQ, BK] with NaN by the flags of their rows, and ``hidden`` where nothing is seen."""
    if MASKED:
        b_s += flag
    return tl.where(seen, b_s, hidden)


@triton.jit
def _probabilities(b_s):
    """[BP, BQ, BK] from scores to base 2; 0 where nothing is seen."""
    b_m = tl.max(b_s, 2, keep_dims=True)
    b_p = tl.exp2(b_s - tl.where(b_m == -float("inf"), 0.0, b_m))
    b_l = tl.sum(b_p, 2, keep_dims=True)
    return b_p * tl.where(b_l == 0.0, 0.0, 1 / b_l)


@triton.jit
def _channels_gated(share, b_do, b_g, b_a, b_p, b_v, seen, o_part, m_out, SHAPE: tl.constexpr):
    """dout of the temporal result, [BP, BQ, W], under a gate that varies with the channel, whose gradient is stored."""
    ROW: tl.constexpr = SHAPE.ROW
    if share.g is not None:
        b_v, v_flag = finite_rows(b_v, SHAPE.MASKED)
        if SHAPE.MASKED:
            b_p = poisoned(b_p, transposed(v_flag), seen, 0.0)
        store_channel_gradients(share.g, b_do, b_a, weighted(b_p, b_v), o_part, m_out, ROW, SHAPE.GATE_FRAMES)
    return materialize_before_dot(to(mul(to(b_do, tl.float32), rest_of(b_g)), b_v[0].dtype))


@triton.jit
def _rows_gated(share, b_do, b_g, b_a, b_p, b_dp, o_row, m_out):
    """Gradients of probabilities, and what v is weighed with, under a gate of one number a row: scores take it instead
    of dout. Its gradient is stored.
    """
    if share.g is not None:
        store_row_gradients(share.g, b_do, b_a, tl.sum(b_p * b_dp, 2, keep_dims=True), o_row, m_out)
    return b_dp * (1 - b_g[0]), b_p * (1 - b_g[0])


@triton.jit
def _load_head(q, do, p_dlse, gate, share, head, o_t, m_t, o_row, SHAPE: tl.constexpr):
    """Of one query head q and dout [BP, BQ, W], the gradient of lse, the gate, and the result that it weighs."""
    A: tl.constexpr = SHAPE.A
    ROW: tl.constexpr = SHAPE.ROW
    m_row = head.m[:, None] & m_t[None, :]
    b_q = materialize_before_dot(load_frames(q, head, o_t, m_t, A, ROW))
    b_do = materialize_before_dot(load_frames(do, head, o_t, m_t, A, ROW))
    b_dlse = load_dlse(p_dlse, o_row, m_row)  # [BP, BQ, 1]
    b_g, b_a = 0.0, 0.0
    if gate is not None:
        b_g, b_a = load_mixed(gate, head, o_t, o_row, m_row, m_row, SHAPE)
    return b_q, b_do, b_dlse, b_g, b_a


@triton.jit(do_not_specialize=[*Frames._fields, "S", "G"])
def temporal_attention_bwd_kernel(
    q,
    k,
    v,
    do,
    dq,
    dk,
    dv,
    gate,
    share,
    p_dlse,
    p_len,
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
    S,
    G,
    sm_scale,
    SHAPE: tl.constexpr,
):
    """One program: all gradients of BP sequences (position, key/value head), R query heads each.

    q, do, dq: Rows (B, T, S, G*R, D). k, v, dk, dv: Rows (B, T_k, S, G, D). p_dlse: (B, T, S, G*R), or None. p_len:
    (B,), or None. gate: a Gate that weighs another result a, which this one is added to, do the gradient of their sum
    and share a Share to be filled; or None. A row that sees what is not finite may become NaN as a whole, as forward's.
    """
    ROW: tl.constexpr = SHAPE.ROW
    A: tl.constexpr = SHAPE.A
    R: tl.constexpr = SHAPE.R
    MASKED: tl.constexpr = SHAPE.MASKED
    frames = Frames(T, T_k, q_start, past, future, chunk, sink, group, clean, shots)
    at = sequence_block(tl.program_id(0), S, G, SHAPE.BP)
    o_t, o_f = tl.arange(0, SHAPE.BQ), tl.arange(0, SHAPE.BK)
    m_t, m_f, seen = frame_pairs(p_len, at.b, frames, o_t, o_f, MASKED)
    m_out = at.m[:, None] & (o_t < T)[None, :]

    # All that is read is on its way before anything waits: a barrier in between is a second trip to memory.
    b_k = materialize_before_dot(load_frames(k, at, o_f, m_f, A, ROW))  # [BP, BK, W]
    b_v = materialize_before_dot(load_frames(v, at, o_f, m_f, A, ROW))
    head, o_row = query_head(at, 0, R), row_offsets(query_head(at, 0, R), o_t, T, S, G * R)
    b_q, b_do, b_dlse, b_g, b_a = _load_head(q, do, p_dlse, gate, share, head, o_t, m_t, o_row, SHAPE)

    b_k, k_flag = finite_rows(b_k, MASKED)
    b_dk, b_dv = zeros(SHAPE.BP, SHAPE.BK, ROW), zeros(SHAPE.BP, SHAPE.BK, ROW)
    for i_r in range(R):
        if R > 1:
            head = query_head(at, i_r, R)
            o_row = row_offsets(head, o_t, T, S, G * R)
            b_q, b_do, b_dlse, b_g, b_a = _load_head(q, do, p_dlse, gate, share, head, o_t, m_t, o_row, SHAPE)
        b_q, q_flag = finite_rows(b_q, MASKED)
        b_s = inner(b_q, b_k) * (sm_scale * LOG2_E)  # [BP, BQ, BK]
        b_p = _probabilities(_flagged(b_s, q_flag + transposed(k_flag), seen, -float("inf"), MASKED))
        b_db = b_do  # the gradient of this result
        if gate is not None:
            store_rows(share.a, o_row * ROW.D, m_out, mul(to(b_do, tl.float32), b_g), ROW)
            if SHAPE.GATE_ROWS:
                o_part = o_row if SHAPE.GATE_FRAMES else row_offsets(head, o_t * 0, 1, S, G * R)
                b_db = _channels_gated(share, b_do, b_g, b_a, b_p, b_v, seen, o_part, m_out, SHAPE)
        b_db, do_flag = finite_rows(b_db, MASKED)
        b_dp, b_w = _flagged(inner(b_db, b_v), do_flag, seen, 0.0, MASKED), b_p
        if gate is not None and not SHAPE.GATE_ROWS:
            b_dp, b_w = _rows_gated(share, b_do, b_g, b_a, b_p, b_dp, o_row, m_out)
        b_delta = tl.sum(b_p * b_dp, 2, keep_dims=True) - b_dlse
        b_ds = tl.where(seen, b_p * (b_dp - b_delta) * sm_scale, 0.0)
        if MASKED:
            b_w = poisoned(b_w, do_flag, seen, 0.0)
        b_dv = add(b_dv, weighted(transposed(b_w.to(b_db[0].dtype)), b_db))
        b_dk = add(b_dk, weighted(transposed(b_ds.to(b_q[0].dtype)), b_q))
        store_frames(dq, head, o_t, T, weighted(b_ds, b_k), A, ROW)
    store_frames(dv, at, o_f, T_k, b_dv, A, ROW)
    store_frames(dk, at, o_f, T_k, b_dk, A, ROW)


def _pick(q: Tensor, k: Tensor, gate: Gate | None) -> tuple[ValuesConfig, int] | None:
    weight = 2 if q.shape[3] > k.shape[3] else 1  # heads that share keys: two more sums
    # Found by compiling: a gate's rows beside the others spill, where it is one number a row on small GPUs alone.
    if gate is not None and (gate.d != 0 or not arch_of(q).startswith(("sm_9", "sm_10"))):
        weight *= 2
    return pick_sequences(BACKWARD, q, q.shape[1], k.shape[1], split_row(q.shape[4]), weight)


def fits(q: Tensor, k: Tensor, gate: Gate) -> bool:
    """Whether backward under a gate takes all frames at once."""
    return _pick(q, k, gate) is not None


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
    gate: Gate | None = None,
    share: Share | None = None,
) -> dict[str, Tensor]:
    """Fills the gradients of q, k and v, which may be slices of a packed one, their heads contiguous.

    With a gate, where all frames fit in registers (fits), dout is of ``gate * gate.a + (1 - gate) * out``, and share is
    filled; neither out nor lse is read.

    Returns the wanted among ``"q_weight"``, ``"k_weight"``, ``"q_bias"``, ``"k_bias"``, ``"cos"``, ``"sin"``, float32.
    """
    frames: dict[str, Any] = {"mask": mask, "q_start": q_start, "lengths": lengths}
    moves = norm is not None or rope is not None
    q_seen, k_seen, (dq, dk, dv) = q, k, gradients
    if moves:
        q_seen, k_seen = (norm_rope_forward(x, norm, n, rope, i) for n, x, i in (("q", q, q_start), ("k", k, 0)))
        dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    picked = _pick(q, k, gate)
    backward: dict[str, Any] = {"dout": dout, "dlse": dlse, "gradients": (dq, dk, dv), "sm_scale": sm_scale, **frames}
    if picked is None:
        temporal_long_backward(q_seen, k_seen, v, out, lse, **backward)
    else:
        _short_backward(q_seen, k_seen, v, picked=picked, gate=gate, share=share, **backward)
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
    *,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    picked: tuple[ValuesConfig, int],
    gate: Gate | None,
    share: Share | None,
    sm_scale: float,
    **frames: Any,
) -> None:
    """All frames in one pass, of q and k that are normalized and rotated."""
    config, BP = picked
    G = k.shape[3]
    names = ("q", "k", "v", "do", "dq", "dk", "dv")
    A, found = aligned_rows(q, k, v, dout, *gradients)
    parts = None if share is None or share.g is None or share.g.ndim < 5 else share.g  # of a gate by channels
    gate_rows = parts is not None or (gate is not None and gate.d != 0)
    gate_frames = parts is not None and parts.shape[1] == q.shape[1]
    shared = temporal_arguments(
        q, k, row=split_row(q.shape[4]), A=A, BP=BP, gate_rows=gate_rows, gate_frames=gate_frames, **frames
    )
    launch(
        temporal_attention_bwd_kernel,
        q.shape[0] * cdiv(q.shape[2] * G, BP),
        like=q,
        config=config,
        **dict(zip(names, found)),
        gate=gate,
        share=share,
        p_dlse=dlse,
        sm_scale=sm_scale,
        **shared,
    )
