"""The report: one page without a network, and plots of whatever rows there are."""

import re
from html.parser import HTMLParser

from small import row

from vdcore_bench.measure.journal import PROFILE
from vdcore_bench.report import curves, results

PNG = b"\x89PNG\r\n\x1a\n"


def rows_of_a_run():
    jobs = [row(p50=2e-3), row("copy", 1e-3), row("sdpa[flash]", 4e-3), row("naive", 9e-3)]
    jobs.append(row("xformers", status="skipped", reason="<xformers> is not installed", p50=None))
    points = []
    for x in (8, 16, 32):
        for provider, factor in (("naive", x), ("vdcore", 1)):
            status = "predicted" if provider == "naive" and x == 32 else "ok"
            shared = {"case": f"{PROFILE}full 3D", "x": x, "status": status, "variant": ""}
            points.append(row(provider, factor * x * 1e6, metric="memory", unit="bytes", **shared))
            points.append(row(provider, factor * x * 1e-3, reason="why it is predicted", **shared))
    overhead = [row(p50=5e-6, metric="overhead"), row(p50=2e-6, metric="overhead", variant="kernel alone")]
    return jobs + overhead + points


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_files(tmp_path):
    written = results.write(rows_of_a_run(), tmp_path)
    assert {path.name for path in written} == {"temporal_attention.png", "profile.png", "report.html"}
    assert all(path.read_bytes().startswith(PNG) for path in written if path.suffix == ".png")


def test_the_page_needs_no_network(tmp_path):
    results.write(rows_of_a_run(), tmp_path)
    text = (tmp_path / "report.html").read_text()
    parser = Links()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.found) == 2 and all(link.startswith("data:image/png;base64,") for link in parser.found)
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_page_says_everything(tmp_path):
    results.write(rows_of_a_run(), tmp_path)
    text = (tmp_path / "report.html").read_text()
    for expected in ("2.00x", "a processor", "why it is predicted", "sdpa[flash] strided", "3 us", "~"):
        assert expected in text, expected
    assert "&lt;xformers&gt; is not installed" in text


def test_a_run_that_was_interrupted_at_once_has_a_report(tmp_path):
    assert [path.name for path in results.write([], tmp_path)] == ["report.html"]
    assert "There are no rows." in (tmp_path / "report.html").read_text()


def test_predicted_points_look_different():
    (grid,) = curves.grids(rows_of_a_run())
    assert grid.frames == [8, 16, 32]
    assert grid.rows[-1] == ("32", "~977 MiB, ~1.02 s", "30.5 MiB, 32 ms")
