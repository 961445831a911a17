"""Context parallelism on processes over gloo beside one process (hazard 28): what every rank of a world finds."""

import pytest
from worldcases import MODULES, names, run_cases

from vdcore.parallel.world import run_ranks


def wrong_in_a_world(ranks, thorough, modules=MODULES):
    """By case, what went wrong on each rank. After a failure nobody knows where the others are: no more are run."""
    cases = names(thorough, modules)
    found = run_ranks(run_cases, ranks, cases, thorough, timeout=400 if thorough else 170)
    wrong = [f"{case}, rank {rank}: {of[case]}" for case in cases for rank, of in enumerate(found) if of.get(case)]
    assert wrong or all(set(of) == set(cases) for of in found)
    return "\n".join(wrong)


@pytest.fixture(scope="module")
def wrong_on_three_ranks():
    """In the set-up of the one test that takes it: a world's processor time is that of three processes."""
    return wrong_in_a_world(3, False)


def test_three_ranks(wrong_on_three_ranks):
    assert not wrong_on_three_ranks, wrong_on_three_ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_more_ranks_and_all_alternatives(ranks):
    wrong = wrong_in_a_world(ranks, True)
    assert not wrong, wrong


@pytest.mark.slow
def test_beside_the_compiler_and_data_parallelism():
    wrong = wrong_in_a_world(4, True, ("wrapping",))
    assert not wrong, wrong
