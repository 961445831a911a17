"""All pairs of documented alternatives of every operator's arguments, sizes, layouts, dtypes and distributions."""

import pytest
import torch
from support import backends_of, check, skip_unless_runs

from vdcore.testing.alternatives import SPACES, case_of, pairwise


def trials(backends):
    return [
        pytest.param(op, *drawn, backend, id=f"{op}-{number}-{backend}")
        for op, space in SPACES.items()
        for number, drawn in enumerate(pairwise(space))
        for backend in backends_of(op, backends)
    ]


def check_choice(op, choice, sizes, backend):
    case, layout, dtype = case_of(op, choice, sizes), choice["layout"], choice["dtype"]
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    skip_unless_runs(case, backend, dtype, layout=layout, requires_grad=True)
    check(case, backend, dtype, layout=layout)


@pytest.mark.parametrize("op,choice,sizes,backend", trials(["cpu"]))
def test_pairs(op, choice, sizes, backend):
    check_choice(op, choice, sizes, backend)


@pytest.mark.slow
@pytest.mark.parametrize("op,choice,sizes,backend", trials(["sdpa", "triton", "cuda"]))
def test_pairs_interpreted(op, choice, sizes, backend):
    check_choice(op, choice, sizes, backend)
