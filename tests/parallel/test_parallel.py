"""Context parallelism on processes over gloo beside one process (hazard 28): what every rank of a world finds."""

import functools

import pytest
from worldcases import MODULES, names, run_cases

from vdcore.parallel.world import run_ranks


@functools.cache
def world(ranks, thorough, modules=MODULES):
    """By case, what went wrong on each rank; a rank's cases after a failure are missing."""
    cases = names(thorough, modules)
    return run_ranks(run_cases, ranks, cases, thorough, timeout=400 if thorough else 170)


def judge(case, *which):
    wrong = [f"rank {rank}: {found[case]}" for rank, found in enumerate(world(*which)) if found.get(case)]
    assert not wrong, "\n".join(wrong)
    assert all(case in found for found in world(*which)), "not reached: a case before it failed"


@pytest.fixture(scope="session")
def quick_world():
    return world(3, False)


@pytest.mark.parametrize("case", names(False))
def test_three_ranks(case, quick_world):
    judge(case, 3, False)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_more_ranks_and_all_alternatives(ranks):
    for case in names(True):
        judge(case, ranks, True)


@pytest.mark.slow
@pytest.mark.parametrize("case", names(True, ("wrapping",)))
def test_beside_the_compiler_and_data_parallelism(case):
    judge(case, 4, True, ("wrapping",))
