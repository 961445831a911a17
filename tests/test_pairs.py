"""All pairs of documented alternatives of every operator's arguments, sizes, layouts, dtypes and distributions."""

import pytest
import torch
from support import backends_of, check, skip_unless_runs

from vdcore.ops.alternatives import MORE_MASKS
from vdcore.testing.alternatives import SPACES, case_of, pairwise


def trials(backends):
    return [
        pytest.param(op, *drawn, backend, id=f"{op}-{number}-{backend}")
        for op, space in SPACES.items()
        for number, drawn in enumerate(pairwise(space))
        for backend in backends_of(op, backends)
    ]


def with_more_masks(backends, every=9):
    """Some of the same calls, with the masks of teacher forcing and of shots in turn."""
    found = []
    for trial in trials(backends):
        op, choice, sizes, backend = trial.values
        number = int(trial.id.split("-")[1])
        if "mask" in choice and number % every == 0:
            mask = MORE_MASKS[number // every % len(MORE_MASKS)]
            found.append(pytest.param(op, {**choice, "mask": mask}, sizes, backend, id=trial.id))
    return found


def check_choice(op, choice, sizes, backend):
    case, layout, dtype = case_of(op, choice, sizes), choice["layout"], choice["dtype"]
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    skip_unless_runs(case, backend, dtype, layout=layout, requires_grad=True)
    check(case, backend, dtype, layout=layout)


@pytest.mark.parametrize("op,choice,sizes,backend", trials(["cpu"]))
def test_pairs(op, choice, sizes, backend):
    check_choice(op, choice, sizes, backend)


@pytest.mark.parametrize("op,choice,sizes,backend", with_more_masks(["cpu"]))
def test_more_masks(op, choice, sizes, backend):
    check_choice(op, choice, sizes, backend)


@pytest.mark.slow
@pytest.mark.parametrize("op,choice,sizes,backend", with_more_masks(["triton"], every=23))
def test_more_masks_interpreted(op, choice, sizes, backend):
    check_choice(op, choice, sizes, backend)


@pytest.mark.slow
@pytest.mark.parametrize("op,choice,sizes,backend", trials(["sdpa", "triton", "cuda"]))
def test_pairs_interpreted(op, choice, sizes, backend):
    check_choice(op, choice, sizes, backend)
