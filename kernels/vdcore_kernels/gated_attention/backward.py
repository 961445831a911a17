"""Gated attention: spatial attention, then temporal attention whose epilogue mixes the two.

The mix costs one more read of the spatial result beside the temporal pass over q, k, v and out; without gradients it
happens in the output itself. Backward is temporal attention's, which has scores and dout at hand: one pass reads q, k,
v, dout and the spatial result, and fills their gradients and the gate's, 9 tensors. Over more frames than a program
holds the temporal result is computed again and dout split by a pass over both results: 16 tensors and the blocks'. The
gate's gradient is summed in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.gate import Share, gate_arguments, load_gate
from vdcore_kernels.core.launch import ValuesConfig, arch_of, cdiv, how_many, launch, pick, power_of_2, step
from vdcore_kernels.core.tile import add, column_sum, load_rows, mul, row_sum, rows, scale, split_row, store_rows, to
from vdcore_kernels.temporal_attention.backward import fits, temporal_backward
from vdcore_kernels.temporal_attention.forward import temporal_forward

SPLIT = (
    ValuesConfig("interpreter", 4, 1, "several programs in a small case", 256),
    ValuesConfig("", 4, 1, "three tensors in, two out: 4 loads of 16 bytes a thread and tensor", 4096),
)


@triton.jit(do_not_specialize=["T", "S", "H", "chunks"])
def gate_bwd_kernel(
    do,
    p_a,
    p_b,
    gate,
    p_da,
    p_db,
    p_dg,
    p_len,
    T,
    S,
    H,
    chunks,  # of a frame's tokens
    ROW: tl.constexpr,
    A: tl.constexpr,
    BR: tl.constexpr,  # tokens
    GATE_ROWS: tl.constexpr,  # the gate varies with the channel
    GATE_TOKENS: tl.constexpr,  # and with the token
):
    """One program: BR tokens of one frame and head. do: Rows (B, T, S, H, D). p_a, p_b, p_da, p_db: (B, T, S, H, D),
    contiguous: the spatial and the temporal result, and their gradients. p_dg: (B, T, S or chunks, H, D or 1), float32;
    or None. p_len: (B,), or None.
    """
    i = tl.program_id(0)
    i_c = i % chunks
    i_h = (i // chunks % H).to(tl.int64)
    i_bt = (i // chunks // H).to(tl.int64)
    i_b, i_t = i_bt // T, i_bt % T
    o_s = (i_c * BR + tl.arange(0, BR)).to(tl.int64)
    m_s = o_s < S
    m_live = m_s
    if p_len is not None:
        m_live = m_s & (i_t < tl.load(p_len + i_b))
    o_row = (i_bt * S + o_s) * H + i_h
    b_do = load_rows(do.p + (i_b * do.b + i_t * do.t + i_h * do.h) * A, o_s * do.s * A, m_live, ROW)  # [BR, W]
    b_do = to(b_do, tl.float32)
    b_a = to(load_rows(p_a, o_row * ROW.D, m_live, ROW), tl.float32)
    b_b = to(load_rows(p_b, o_row * ROW.D, m_live, ROW), tl.float32)
    p_g = gate.p + i_b * gate.b + i_t * gate.t + i_h * gate.h
    b_g = load_gate(p_g, o_s * gate.s, m_live, gate.d, ROW, GATE_ROWS)  # [BR, W or 1]
    b_da = mul(b_g, b_do)
    store_rows(p_da, o_row * ROW.D, m_s, b_da, ROW)
    store_rows(p_db, o_row * ROW.D, m_s, add(b_do, scale(b_da, -1.0)), ROW)
    if p_dg is not None:
        b_dg = mul(b_do, add(b_a, scale(b_b, -1.0)))
        one = tl.arange(0, 1).to(tl.int64)
        o_part = (i_bt * chunks + i_c) * H + i_h + one
        if GATE_ROWS:
            if GATE_TOKENS:
                store_rows(p_dg, o_row * ROW.D, m_s, b_dg, ROW)
            else:
                store_rows(p_dg, o_part * ROW.D, one == 0, column_sum(b_dg), ROW)
        else:
            b_sum = row_sum(b_dg, 0)  # [BR, 1]
            if GATE_TOKENS:
                tl.store(p_dg + o_row[:, None], b_sum, mask=m_s[:, None])
            else:
                tl.store(p_dg + o_part[:, None], tl.sum(b_sum, 0, keep_dims=True))


def _split(
    dout: Tensor, a: Tensor, b: Tensor, gate: Tensor, lengths: Tensor | None, wants_gate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the spatial result a, the temporal result b, and of the gate, in float32 and its shape.

    dout, a, b: ``(B, T, S, H, D)``; gate broadcasts to it. Frames past the lengths get 0, whatever dout holds there.
    """
    B, T, S, H, D = dout.shape
    shape = _full_shape(gate)
    row = split_row(D)
    config = pick(SPLIT, arch_of(dout))
    BR = min(how_many(config.values, row.width), power_of_2(S))
    chunks = cdiv(S, BR)
    by_token, by_channel = shape[2] > 1, shape[4] > 1
    da, db = (torch.empty(dout.shape, dtype=dout.dtype, device=dout.device) for _ in range(2))
    parts = None
    if wants_gate:
        size = (B, T, S if by_token else chunks, H, D if by_channel else 1)
        parts = torch.empty(size, dtype=torch.float32, device=dout.device)
    A = step(dout)
    launch(
        gate_bwd_kernel,
        B * T * H * chunks,
        like=dout,
        config=config,
        do=rows(dout, A),
        p_a=a,
        p_b=b,
        gate=gate_arguments(gate, a),
        p_da=da,
        p_db=db,
        p_dg=parts,
        p_len=lengths,
        T=T,
        S=S,
        H=H,
        chunks=chunks,
        ROW=row,
        A=A,
        BR=BR,
        GATE_ROWS=by_channel,
        GATE_TOKENS=by_token,
    )
    return da, db, None if parts is None else _summed(parts, gate)


def _full_shape(gate: Tensor) -> tuple[int, ...]:
    return (1,) * (5 - gate.ndim) + tuple(gate.shape)


def _summed(parts: Tensor, gate: Tensor) -> Tensor:
    """The gate's gradient, float32, from parts of it with five axes."""
    summed = [axis for axis, n in enumerate(_full_shape(gate)) if n == 1 and parts.shape[axis] != 1]
    return (parts.sum(summed) if summed else parts).reshape(gate.shape)


def _share(a: Tensor, gate: Tensor, wants_gate: bool) -> Share:
    """Room for the gradients of a and of the gate."""
    B, T, S, H, D = a.shape
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if not wants_gate:
        return Share(da, None)
    _, by_frame, _, _, by_channel = (n > 1 for n in _full_shape(gate))
    size = (B, T if by_frame else 1, S, H, D) if by_channel else (B, T, S, H)
    return Share(da, torch.empty(size, dtype=torch.float32, device=a.device))


def gated_temporal_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    lse: Tensor,
    dout: Tensor,
    gate: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    wanted: frozenset[str],
    *,
    wants_gate: bool,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Backward of ``gate * a + (1 - gate) * temporal attention``: gradients of a and of the gate, in float32 and its
    shape, and what temporal_backward returns, which fills the gradients of q, k and v.

    a, dout: ``(B, T, S, H, D)``, a contiguous; gate broadcasts to it. lse: of temporal attention. arguments: as its.
    Frames past the lengths get 0, whatever dout holds there.
    """
    given: dict[str, Any] = {"lse": lse, "dlse": None, "gradients": gradients, "wanted": wanted, **arguments}
    weighs = gate_arguments(gate, a)
    if fits(q, k, weighs):
        share = _share(a, gate, wants_gate)
        found = temporal_backward(q, k, v, out=a, dout=dout, gate=weighs, share=share, **given)
        if share.g is None:
            return share.a, None, found
        parts = share.g if share.g.ndim == 5 else share.g.unsqueeze(4)
        return share.a, _summed(parts, gate), found
    b = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    temporal_forward(q, k, v, b, None, **arguments)
    da, db, dgate = _split(dout, a, b, gate, arguments["lengths"], wants_gate)
    return da, dgate, temporal_backward(q, k, v, out=b, dout=db, **given)
