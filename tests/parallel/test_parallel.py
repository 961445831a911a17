"""Context parallelism on processes over gloo beside one process (hazard 28): what every rank of a world finds."""

import functools

import pytest
from worldcases import names, run_cases

from vdcore.parallel.world import run_ranks


@functools.cache
def world(ranks, thorough):
    """By case, what went wrong on each rank; a rank's cases after a failure are missing."""
    return run_ranks(run_cases, ranks, names(thorough), thorough, timeout=400 if thorough else 170)


def judge(ranks, thorough, case):
    wrong = [f"rank {rank}: {found[case]}" for rank, found in enumerate(world(ranks, thorough)) if found.get(case)]
    assert not wrong, "\n".join(wrong)
    if not all(case in found for found in world(ranks, thorough)):
        pytest.fail("not reached: a case before it failed")


@pytest.fixture(scope="session")
def quick_world():
    return world(3, False)


@pytest.mark.parametrize("case", names(False))
def test_three_ranks(case, quick_world):
    judge(3, False, case)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_more_ranks_and_all_alternatives(ranks):
    for case in names(True):
        judge(ranks, True, case)
