"""Which plan is taken, and what it would send: no processes needed."""

import pytest

from vdcore import FrameMask
from vdcore.parallel import explain, part_sizes

M = 2 * 16 * 100 * 12 * 64  # bytes of one of q, k, v, out
SHAPE = (1, 16, 100, 12, 64)


def sent(ranks, **given):
    return {plan.name: plan.most for plan in explain(SHAPE, ranks, **given)}


def test_bytes_are_those_of_the_formulas_where_sizes_divide():
    for N in (2, 4):
        found = sent(N)
        assert found["heads"] == 4 * M / N * (N - 1) / N
        assert found["ring"] == found["halo"] == 2 * M / N * (N - 1)
        assert sent(N, op="temporal_attention")["switch"] == 2 * M / N * (N - 1) / N
        assert sent(N, mask=FrameMask.window(1))["halo"] == 2 * M / 16
        assert sent(N, mask=FrameMask(past=0, future=0, chunk=16 // N))["halo"] == 0
    assert sent(1) == {"heads": 0, "halo": 0, "ring": 0}


@pytest.mark.parametrize(
    ("ranks", "mask", "taken"),
    [
        (2, FrameMask(), "heads"),
        (4, FrameMask(), "heads"),
        (8, FrameMask(), "ring"),  # 8 ranks do not divide 12 heads
        (8, FrameMask.causal(), "ring"),
        (4, FrameMask.window(1), "halo"),
        (8, FrameMask.window(4), "halo"),  # whole shards: as much as a ring, in one message
        (4, FrameMask.same_frame(), "halo"),
    ],
)
def test_the_plan_that_is_taken(ranks, mask, taken):
    first = explain(SHAPE, ranks, mask=mask)[0]
    assert first.name == taken and first.reason is None and f"{taken}: " in str(first)


def test_a_narrow_temporal_mask_takes_the_halo():
    def taken(mask):
        return explain(SHAPE, 4, mask=mask, op="temporal_attention")[0].name

    assert [taken(m) for m in (FrameMask(), FrameMask.window(6), FrameMask.window(1))] == ["switch", "switch", "halo"]


def test_parts_are_those_of_array_split():
    assert part_sizes(7, 3) == (3, 2, 2) and part_sizes(2, 4) == (1, 1, 0, 0) and part_sizes(0, 2) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((1, 2, 3), 2), r"explain: shape must be \(B, T, S, H, D\), got \(1, 2, 3\)"),
        ((SHAPE, 0), "explain: ranks must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        explain(*arguments)
    with pytest.raises(ValueError, match="explain: op must be 'video_attention' or 'temporal_attention', got 'x'"):
        explain(SHAPE, 2, op="x")
