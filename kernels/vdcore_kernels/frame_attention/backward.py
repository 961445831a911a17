"""Spatial, video and cross attention backward: delta, then the queries' gradient, then the keys' and values'.

Every gradient is summed by one program in a fixed order: no atomics, at the price of computing the scores twice (seven
products for five). Probabilities come back from lse; tiles are walked through as forward walks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdcore_kernels.core.tokens import NEAR
from vdcore_kernels.frame_attention.backward_keys import key_programs, launch_keys
from vdcore_kernels.frame_attention.backward_queries import launch_queries
from vdcore_kernels.frame_attention.backward_rows import Given, gradient_layout, gradient_row, row_pairs
from vdcore_kernels.frame_attention.problem import FrameProblem, Triple


def frame_backward(
    problem: FrameProblem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: Triple,
    text_gradients: Triple | None = None,
) -> None:
    """Fills the gradients of what frame_forward takes, in its shapes; dout as out, any strides; dlse as lse."""
    # Scores of negated queries: the gradient of q turns its sign, that of k comes out right.
    p = problem.with_positive_scores()
    dout = dout if dout.stride(1) < NEAR else dout.contiguous()
    programs = key_programs(p)
    dq, dk, dv = gradients
    if programs.splits > 1:
        size = (programs.splits * p.k.shape[0], *p.k.shape[1:])
        dk, dv = (torch.empty(size, dtype=torch.float32, device=p.k.device) for _ in range(2))
    layout = gradient_layout(p, dout, (dq, dk, dv), text_gradients)
    row = gradient_row(p.q.shape[4])
    given = Given(layout, row, dout, row_pairs(out, lse, dout, dlse, row=row, A=layout.A, exponent=p.exponent))
    launch_queries(p, given, dlse)
    launch_keys(p, given, programs)
    if programs.splits > 1:
        for whole, parts in zip(gradients[1:], (dk, dv)):
            whole.copy_(parts.unflatten(0, (programs.splits, p.k.shape[0])).sum(0))
