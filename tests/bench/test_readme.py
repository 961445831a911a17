"""The README's tables: made by the generator, and up to date."""

from pathlib import Path

import pytest
from small import row
from vdcore.bench import readme

ROOT = Path(__file__).parents[2]


def marked(name):
    return f"before\n<!-- table:{name} -->\nold\n<!-- /table -->\nafter\n"


def test_the_operator_table_of_the_readme_is_up_to_date():
    """Run `vdcore bench --readme README.md` after adding an operator to a backend."""
    text = (ROOT / "README.md").read_text()
    if "<!-- table:operators -->" in text:
        assert readme.operators(ROOT) in text


def test_the_operator_table_has_every_operator_and_backend():
    table = readme.operators(ROOT)
    assert "| `temporal_attention` | fwd + bwd |" in table
    assert table.splitlines()[0].count("|") == 7


def test_a_marked_table_is_replaced_and_nothing_else():
    filled = readme.fill(marked("operators"), ROOT)
    assert filled.startswith("before\n<!-- table:operators -->\n| operator |")
    assert filled.endswith("<!-- /table -->\nafter\n") and "old" not in filled
    assert readme.fill(filled, ROOT) == filled


def test_results_come_from_committed_rows(tmp_path):
    folder = tmp_path / "bench" / "results" / "somewhere"
    folder.mkdir(parents=True)
    rows = [row(p50=9.0, time="2020"), row(p50=2.0, time="2021"), row("naive", 5.0, time="2022", commit="abc123")]
    (folder / "cpu.jsonl").write_text("".join(r.to_json() + "\n" for r in rows))
    table = readme.fill(marked("cpu"), tmp_path)
    assert "2.50x" in table and "a processor" in table and "abc123" in table
    assert "No results" in readme.fill(marked("gpu"), tmp_path)


def test_unknown_tables_and_missing_ends_are_errors(tmp_path):
    with pytest.raises(ValueError, match="known are operators"):
        readme.fill(marked("weather"), tmp_path)
    with pytest.raises(ValueError, match="no <!-- /table -->"):
        readme.fill("<!-- table:cpu -->\n", tmp_path)
