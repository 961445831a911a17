"""Hazard 16: same inputs, same bits, run after run, whatever the number of threads; and a control that must fail."""

import pytest
import torch
from support import FAST, dtype_of, on_backends, skip_unless_runs

import vdcore
from vdcore.testing import cases_of, run

# A race that shows in 3 runs of 10 gets past 10 repeats once in 35 times; nightly there are 100.
REPEATS = 10


def bits(outcome):
    as_integers = {4: torch.int32, 2: torch.int16}
    return [x.view(as_integers[x.element_size()]) for x in [*outcome.outputs, *outcome.gradients.values()]]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def check_repeats(case, backend, repeats):
    inputs = skip_unless_runs(case, backend, dtype_of(backend), requires_grad=True)
    function = getattr(vdcore, case.op)
    first = bits(run(inputs, function, backend=backend))
    for _ in range(repeats):
        assert same(first, bits(run(inputs, function, backend=backend)))


REPEATED = cases_of(tag="norm_rope") + cases_of(tag="plain") + cases_of(tag="long")


@on_backends(REPEATED, [*FAST, "cuda"])
def test_repeats(case, backend):
    # The reference shows what the others are held to; it and an emulator are too slow for more.
    check_repeats(case, backend, REPEATS if backend == "cpu" else 1)


@pytest.mark.slow
@on_backends(REPEATED, ["cpu"])
def test_a_hundred_repeats(case, backend):
    check_repeats(case, backend, 100)


@on_backends(cases_of(tag="norm_rope"), ["cpu"])
def test_number_of_threads(case, backend):
    """Work big enough to be split, at 1 to 4 threads."""
    inputs = skip_unless_runs(case, backend, torch.float32, requires_grad=True)
    function, before = getattr(vdcore, case.op), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(bits(run(inputs, function, backend=backend)))
        assert all(same(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


def test_the_control_fails():
    """Summing in a random order, as atomics do, changes bits: the comparison above would see it."""
    x = torch.randn(100_000)
    place = torch.zeros(len(x), dtype=torch.int64)
    sums = {torch.zeros(1).index_add_(0, place, x[torch.randperm(len(x))]).item() for _ in range(20)}
    assert len(sums) > 1
