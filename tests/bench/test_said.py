"""The sentences on top of reports: of which rows they are, and the numbers in them."""

from small import row

from vdcore_bench.measure.journal import PROFILE
from vdcore_bench.report import results, said


def point(provider, frames, metric, value, status="ok"):
    case, unit = f"{PROFILE}full 3D", "bytes" if metric == "memory" else "s"
    return row(provider, value, x=frames, case=case, metric=metric, unit=unit, status=status, variant="")


def test_a_profile_says_what_the_others_take():
    rows = [
        *(point("vdcore", n, metric, 1.0 * n) for n in (8, 16) for metric in ("memory", "time")),
        *(point("naive", n, metric, n * n / 4) for n in (8, 16) for metric in ("memory", "time")),
        point("sdpa", 8, "memory", 12.0),
        point("sdpa", 16, "memory", 99.0, "predicted"),
    ]
    ((memory, time, rest),) = said.sentences(rows)
    assert "memory over vdcore's is 1.5 (sdpa, full 3D, 8 frames) to 4 (naive, full 3D, 16 frames)" in memory
    assert "time over vdcore's is 4 (naive, full 3D, 16 frames)." in time
    assert rest == "Of 10 numbers 1 are predicted, as they would not fit, and 0 failed."


def test_every_suite_has_its_paragraph():
    """Operators first, and each above the tables."""
    rows = [row(), row("sdpa[flash]", 3.0), point("vdcore", 8, "time", 1.0), point("naive", 8, "time", 2.0)]
    first, second = said.sentences(rows)
    assert "at least as fast" in first[0] and "naive" in second[0]
    page = results.report(rows, {})
    assert page.index("at least as fast") < page.index("At the most frames") < page.index("<table>")


def test_without_rows_nothing_is_said():
    assert said.sentences([]) == []
