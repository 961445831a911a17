"""Tables: rows as one line a job, and the numbers over all workloads."""

import pytest
from small import row

from vdcore_bench.measure.machine import seconds_text
from vdcore_bench.report import summary

TIMES = [
    row(p50=2.0),
    row("copy", 1.0, variant="existing memory"),
    row("naive", 9.0),
    row("sdpa[flash]", 4.0),
    row("sdpa[flash]", 5.0, variant="permuted copies"),
    row("vdcore[sdpa]", 4.5, variant="named"),
]


def other(rows, **kwargs):
    return [row(r.provider, r.p50, **{"variant": r.variant, **kwargs}) for r in rows]


def test_the_fastest_variant_of_the_fastest_peer_counts():
    (line,) = summary.lines(TIMES)
    assert (line.best.provider, line.best.variant) == ("sdpa[flash]", "strided")
    assert line.speedup == pytest.approx(2.0) and line.over_copy == pytest.approx(2.0)
    assert line.naive.p50 == 9.0 and not line.noise


@pytest.mark.parametrize(("products", "times"), [(None, 2.0), (0.5, 2.0), (1.6, 1.25)])
def test_the_larger_floor_counts_and_both_are_printed(products, times):
    (line,) = summary.lines([row(p50=2.0, products=products), row("copy", 1.0), row("copy", 1.5, variant="fresh")])
    assert line.over_floor == pytest.approx(times)
    cells = dict(zip(summary.HEADER, summary.cells(line), strict=True))
    assert cells["floors: copy, products"] == ("1 s, -" if products is None else f"1 s, {seconds_text(products)}")


def test_neither_our_other_backends_nor_the_copy_are_peers():
    (line,) = summary.lines([row(p50=2.0), row("vdcore[sdpa]", 0.1, variant="named"), row("copy", 0.1)])
    assert line.best is None and line.speedup is None


def test_overlapping_intervals_are_called_noise():
    (line,) = summary.lines([row(p50=2.0), row("naive", 2.03)])
    assert line.noise and summary.cells(line)[5].endswith("~")


def test_the_bar_is_the_geometric_mean_and_the_minimum_over_workloads():
    rows = TIMES + other(TIMES, workload="svd-xt-level1")
    rows += [row(p50=1.0, workload="a"), row("naive", 8.0, workload="a")]
    (bar,) = summary.bars(summary.lines(rows))
    assert bar.speedups == pytest.approx((2.0, 2.0, 8.0)) and bar.over_copy == pytest.approx((2.0, 2.0))
    cells = summary.bar_cells(bar)
    assert cells[4] == f"{(2 * 2 * 8) ** (1 / 3):.2f}x" and cells[5] == "2.00x (latte-1-512)"
    assert "minimum 2.00x" in summary.bar_text(bar)


def test_bars_are_apart_by_dtype_mode_and_case():
    rows = TIMES + other(TIMES, dtype="bfloat16") + other(TIMES, mode="fwd+bwd") + other(TIMES, case="norm + rope")
    found = summary.bars(summary.lines(rows))
    assert [(bar.what, bar.job.dtype) for bar in found] == [
        ("fwd", "float32"),
        ("fwd", "bfloat16"),
        ("fwd+bwd", "float32"),
        ("fwd, norm + rope", "float32"),
    ]


def test_what_was_not_measured_is_listed_with_its_reason():
    rows = [*TIMES, row("xformers", status="skipped", reason="xformers is not installed", p50=1.0)]
    (line,) = summary.lines(rows)
    assert summary.absent([line]) == {"xformers is not installed": ["xformers strided"]}


def test_a_wrong_result_of_ours_is_shouted():
    (line,) = summary.lines([row(error_ratio=3.0), *TIMES[1:]])
    (said,) = summary.wrong([line])
    assert "vdcore[cpu] is 3.00 times as wrong as allowed" in said
    assert summary.wrong(summary.lines(TIMES)) == []


def test_overhead_is_the_call_without_its_kernel():
    rows = [
        row(p50=10e-6, metric="overhead"),
        row(p50=4e-6, metric="overhead", variant="kernel alone"),
        row("sdpa", 7e-6, metric="overhead", variant="bare call"),
    ]
    assert [cells[-1] for cells in summary.overhead_cells(rows)] == ["6 us", "-", "-"]


def test_of_two_races_the_later_counts():
    (line,) = summary.lines([*TIMES, row(p50=3.0), row("sdpa[flash]", 7.0), row("compiled", 6.0)])
    assert line.ours.p50 == 3.0 and len(line.peers) == 4
    assert [r.p50 for r in line.peers] == [5.0, 6.0, 7.0, 9.0]


class FakeLoad:
    average = 0.1

    def __init__(self, others, stolen):
        self.so_far = lambda: (others, stolen)


@pytest.mark.parametrize(
    ("others", "stolen", "spread", "busy"),
    [(0.0, 0.0, 0.04, False), (64.0, 0.0, 0.04, True), (0.0, 64.0, 0.04, True), (0.0, 0.0, 1.0, True)],
)
def test_a_busy_machine_is_said_with_its_numbers(others, stolen, spread, busy):
    copies = [row("copy", 1.0, variant=name, p20=1 - spread / 2, p80=1 + spread / 2) for name in ("a", "b")]
    said = summary.noise(copies, FakeLoad(others, stolen))
    assert said.startswith("The machine was busy" if busy else "The machine was quiet")
    assert f"others used {others:.2f}" in said and f"took {stolen:.2f}" in said and f"differ by {spread:.0%}" in said
    assert bool(summary.noise(copies)) == (spread > summary.UNSTEADY), "rows alone know of the copies only"


def test_what_won_and_what_lost_in_sentences():
    lost = [row(p50=5.0, p20=4.9, p80=5.1, workload="a"), row("naive", 4.0, p20=3.9, p80=4.1, workload="a")]
    won, worst, right = summary.sentences(summary.lines([*TIMES, *lost]))
    assert "in 1 of 2 jobs" in won and f"{(2 * 0.8) ** 0.5:.2f}x" in won and "2.00x of sdpa[flash] strided" in won
    assert worst.startswith("It loses 1: worst in") and "0.80x of naive" in worst
    assert "all are within the tolerance rule" in right
    beyond = summary.sentences(summary.lines([row(error_ratio=3.0), *TIMES[1:]]))
    assert "1 are beyond" in beyond[-1] and beyond[1] == "It loses none."
    assert summary.sentences(summary.lines(TIMES[:1])) == []
