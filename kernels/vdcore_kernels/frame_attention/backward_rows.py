"""What both kernels of backward share: what they read of queries, their rows, those of dout and a pair of numbers each,
and what their launches do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdcore_kernels.core.launch import ValuesConfig, cdiv, how_many, launch, power_of_2
from vdcore_kernels.core.tile import LOG2_E, Row, load_rows, mul, row_sum, split_row, to
from vdcore_kernels.core.tokens import Layout, layout_of, load_tokens, result_token, sequence_rows
from vdcore_kernels.frame_attention.problem import Problem, Triple

DELTA = ValuesConfig("", 4, 1, "4 loads of 16 bytes a thread of out and of its gradient", 4096)


@triton.jit(do_not_specialize=["N", "H", "exponent"])
def row_delta_kernel(
    p_o, do, p_lse, p_dlse, p_pairs, N, H, exponent, ROW: tl.constexpr, A: tl.constexpr, BN: tl.constexpr
):
    """One program: of BN rows of one sample and head lse, in units of the scores, and delta, the sum of out * dout over
    channels less dlse: a pair of one load, side by side for the rows of a tile.

    p_o: (B, N, H, D), contiguous. do: Rows (B, N, H, D), t unused. p_lse, p_dlse or None: (B, N, H). p_pairs: (B, H, N,
    2), float32.
    """
    blocks = tl.cdiv(N, BN)
    i_h = (tl.program_id(0) % H).to(tl.int64)  # heads first: they share lines of lse
    i_b = (tl.program_id(0) // H // blocks).to(tl.int64)
    o_n = tl.program_id(0) // H % blocks * BN + tl.arange(0, BN)
    m_n = o_n < N
    o_row = (i_b * N + o_n) * H + i_h
    p_do = do.p + (i_b * do.b + i_h * do.h) * A
    b_o = to(load_rows(p_o, o_row * ROW.D, m_n, ROW), tl.float32)  # [BN, W]
    b_do = to(load_rows(p_do, o_n.to(tl.int64) * do.s * A, m_n, ROW), tl.float32)
    b_lse = tl.load(p_lse + o_row, mask=m_n, other=0.0) * (LOG2_E / exponent)
    b_d = tl.reshape(row_sum(mul(b_o, b_do), 0), (BN,))
    if p_dlse is not None:
        b_d -= tl.load(p_dlse + o_row, mask=m_n, other=0.0)
    p_row = p_pairs + ((i_b * H + i_h) * N + o_n) * 2
    tl.store(p_row[:, None] + tl.arange(0, 2)[None, :], tl.join(b_lse, b_d), mask=m_n[:, None])


def gradient_row(D: int) -> Row:
    """One tile above 128 channels: a second one's operands leave no registers for two gradients."""
    return split_row(D) if D <= 128 else Row(D, D, power_of_2(D))


def row_pairs(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *, row: Row, A: int, exponent: float
) -> Tensor:
    """Of dout ``(B, N, H, D)``: lse in units of the scores, and delta, ``(B, H, N, 2)``, float32."""
    B, N, H, D = dout.shape
    pairs = torch.empty(B, H, N, 2, dtype=torch.float32, device=out.device)
    BN = how_many(DELTA.values, power_of_2(D))
    launch(
        row_delta_kernel,
        B * H * cdiv(N, BN),
        like=out,
        config=DELTA,
        p_o=out,
        do=sequence_rows(dout, A),
        p_lse=lse,
        p_dlse=dlse,
        p_pairs=pairs,
        N=N,
        H=H,
        exponent=exponent,
        ROW=row,
        A=A,
        BN=BN,
    )
    return pairs


class Queries(NamedTuple):
    """A tile of queries, their dout, and lse, in units of the scores, and delta."""

    q: Any
    do: Any
    lse: Any
    delta: Any


@triton.jit
def load_pairs(p_pairs, first, m, WIDE: tl.constexpr):
    """lse and delta of rows from ``first`` on, [BM]; 0 where m [BM] is false.

    WIDE: in one piece of 64 bits, which one thread copies; else in two of 32, which take fewer registers.
    """
    o_m = tl.arange(0, m.shape[0])
    if WIDE:
        pairs = tl.load(p_pairs.to(tl.pointer_type(tl.int64)) + (first + o_m), mask=m, other=0)
        return pairs.to(tl.int32).to(tl.float32, bitcast=True), (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        p_row = p_pairs + (first + o_m) * 2
        return tl.split(tl.load(p_row[:, None] + tl.arange(0, 2)[None, :], mask=m[:, None], other=0.0))


@triton.jit
def load_queries(
    q, do, p_pairs, at, m, sizes, frames, NO_LSE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr = False
):
    """BM queries; where m [BM] is false, 0, and NO_LSE for lse."""
    ROW: tl.constexpr = TILE.ROW
    A: tl.constexpr = TILE.A
    o_m = tl.arange(0, TILE.BM)
    b_q = load_tokens(q, at, m, sizes.S_q, TILE.BM, TILE)  # [BM, W]
    first, N = result_token(at, sizes, frames, TILE)
    b_do = load_rows(do.p + (at.b * do.b + at.h * do.h + first * do.s) * A, o_m * do.s * A, m, ROW)
    b_lse, b_delta = load_pairs(p_pairs, (at.b * sizes.H + at.h) * N + first, m, WIDE)
    return Queries(b_q, b_do, tl.where(m, b_lse, NO_LSE), b_delta)


def gradient_layout(p: Problem, dout: Tensor, gradients: Triple, text_gradients: Triple | None) -> Layout:
    """Of q, k and v and of their gradients, with a step that dout shares."""
    text = None if p.text is None or text_gradients is None else (*p.text, *text_gradients)
    return layout_of((p.q, p.k, p.v, *gradients), text, dout)


@dataclass(frozen=True)
class Given:
    """What launches of both kernels take.

    Args:
        layout: of q, k and v, and of the gradients that are filled.
        dout: ``(B, N, H, D)``, its tokens near.
        pairs: of row_pairs.
    """

    layout: Layout
    row: Row
    dout: Tensor
    pairs: Tensor

    def tensors(self) -> dict[str, Any]:
        """What the kernels take by the same names."""
        of_q, of_k, of_v = self.layout.pairs[:3]
        dout = sequence_rows(self.dout, self.layout.A)
        return {"q": of_q, "k": of_k, "v": of_v, "do": dout, "p_pairs": self.pairs}
