"""Models of diffusers whose clips several processes over gloo share, beside the host on one."""

import pytest

pytest.importorskip("diffusers")

from hosts_around import compiled_blocks
from hosts_on_ranks import run_cases
from test_parallel import wrong_in_a_world as cases_in_a_world

from vdcore.parallel.world import run_ranks


def wrong_in_a_world(ranks, thorough, twice=False):
    found = run_ranks(run_cases, ranks, thorough, twice, timeout=1500 if thorough else 170)
    wrong = [f"{case}, rank {rank}: {said}" for rank, of in enumerate(found) for case, (said, _) in of.items() if said]
    for case in found[0]:
        if len({of[case][1] for of in found}) > 1:
            wrong.append(f"{case}: ranks have other bits than one another")
    return "\n".join(wrong)


@pytest.fixture(scope="module")
def wrong_on_two_ranks():
    """In the set-up of the one test that takes it: a world's processor time is that of its processes."""
    return wrong_in_a_world(2, False)


def test_two_ranks(wrong_on_two_ranks):
    assert not wrong_on_two_ranks, wrong_on_two_ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_more_ranks_and_all_alternatives(ranks):
    wrong = wrong_in_a_world(ranks, True, twice=ranks == 3)
    assert not wrong, wrong


@pytest.mark.slow
def test_beside_what_else_wraps_a_model():
    wrong = cases_in_a_world(4, True, ("hosts_around",))
    assert not wrong, wrong


@pytest.mark.slow
def test_compiled_blocks():
    run_ranks(compiled_blocks, 2, timeout=600)
