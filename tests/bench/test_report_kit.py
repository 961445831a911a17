"""The report kit: one table in every form, one page that needs nothing but itself, plots without a window."""

import pytest

from vdcore_bench.report import page, plot, terminal
from vdcore_bench.report.table import Markup, Table, cell

TABLE = Table.of(("who", "a|b"), [("<me>", 1.23456), ("you", None)], "Numbers", note="Of nobody.")


def test_cells():
    assert [cell(x) for x in (1.23456, 12345.6, 7, None, "x")] == ["1.23", "12346", "7", "-", "x"]


def test_markdown():
    assert TABLE.markdown().splitlines() == ["| who | a\\|b |", "| --- | ---: |", "| <me> | 1.23 |", "| you | - |"]
    assert Table.of(("a", "b"), [], text=True).markdown().splitlines()[1] == "| --- | --- |"


def test_html_is_escaped_unless_it_is_markup():
    text = page.titled(Table.of(("who",), [("<me>",), (Markup('<b class="yes">yes</b>'),)], "1 < 2"))
    assert "<h3>1 &lt; 2</h3>" in text and "&lt;me&gt;" in text and '<b class="yes">yes</b>' in text


def test_plain_columns_are_aligned():
    assert TABLE.plain() == "Numbers\n\nwho   a|b\n----  ----\n<me>  1.23\nyou   -\n"


def test_a_terminal_shows_everything(capsys):
    terminal.print_table(TABLE)
    text = capsys.readouterr().out
    assert all(part in text for part in ("Numbers", "a|b", "<me>", "1.23", "Of nobody."))


@pytest.mark.parametrize("suffix", page.PICTURES)
def test_a_page_holds_its_pictures(tmp_path, suffix):
    figure, axes = plot.new_plot(2, 1, columns=2)
    assert len(axes) == 1 and len(axes[0]) == 2
    name = plot.save_plot(figure, tmp_path / "deep" / f"a{suffix}")
    parts = [page.heading("A", anchor="a"), page.note(""), page.image(tmp_path / "deep" / name, pixels=True)]
    text = page.page("title", parts, headline="a & b")
    assert text.startswith("<!doctype html>") and "<h1>a &amp; b</h1>" in text and '<h2 id="a">' in text
    assert f'alt="a{suffix}" src="data:{page.PICTURES[suffix]};base64,' in text
    assert text.count("<style>") == 1 and 'class="pixels"' in text


def test_a_file_is_written_whole(tmp_path):
    page.write_whole(tmp_path / "a.html", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.html", "new")]
