"""Attention of boxes of tokens, backward: delta, then the queries' gradient, then the keys' and values'.

As frame attention's: every gradient is summed by one program in a fixed order.
"""

from __future__ import annotations

from torch import Tensor

from vdcore_kernels.core.tokens import NEAR
from vdcore_kernels.frame_attention.backward_rows import Given, gradient_layout, gradient_row, row_pairs
from vdcore_kernels.frame_attention.problem import Triple
from vdcore_kernels.tile_attention.backward_keys import launch_keys, transposed_lists
from vdcore_kernels.tile_attention.backward_queries import launch_queries
from vdcore_kernels.tile_attention.problem import BoxProblem


def tile_backward(
    problem: BoxProblem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: Triple,
    text_gradients: Triple | None = None,
) -> None:
    """Fills the gradients of what tile_forward takes, in its shapes; dout as out, any strides; dlse as lse."""
    # Scores of negated queries: the gradient of q turns its sign, that of k comes out right.
    p = problem.with_positive_scores()
    dout = dout if dout.stride(1) < NEAR else dout.contiguous()
    layout = gradient_layout(p, dout, gradients, text_gradients)
    row = gradient_row(p.q.shape[4])
    given = Given(layout, row, dout, row_pairs(out, lse, dout, dlse, row=row, A=layout.A, exponent=p.exponent))
    listing = transposed_lists(p)
    for first, end, mask in p.parts():
        launch_queries(p, given, (first, end), mask, dlse)
        launch_keys(p, given, (first, end), mask, listing)
