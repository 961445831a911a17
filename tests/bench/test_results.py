"""Rows and files."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from small import row

from vdcore_bench.measure.journal import FILE, Journal, Row, load, newest, parse


def test_a_row_survives_its_file():
    for error in (None, 0.5, math.inf):
        before = row(error_ratio=error, status="predicted", reason="why", page_faults=3.0, original={"T": 16})
        line = before.to_json()
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert Row.from_json(line) == before


def test_a_row_has_what_the_contract_names():
    names = {field.name for field in dataclasses.fields(Row)}
    assert names >= {"op", "workload", "provider", "mode", "metric", "unit", "x", "p20", "p50", "p80", "error_ratio"}
    assert names >= {"status", "reason", "device", "dtype", "allocator", "versions", "commit", "time", "threads"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().op = "other"


def test_fields_of_another_version_are_left_out():
    values = {**json.loads(row().to_json()), "from_the_future": 1}
    assert Row.from_json(json.dumps(values)) == row(time=values["time"])


def test_rows_are_in_the_file_as_soon_as_they_are_added(tmp_path):
    journal = Journal(tmp_path / "deep" / FILE)
    journal.add([row(), row(provider="naive")])
    assert parse((tmp_path / "deep" / FILE).read_text()) == journal.rows
    journal.close()


@pytest.mark.parametrize("keep", [False, True])
def test_rows_of_all_runs_before_stay_and_the_newest_counts(keep, tmp_path):
    for p50, provider in ((1.0, "a"), (2.0, "b"), (3.0, "a")):
        journal = Journal(tmp_path / FILE, keep=keep)
        assert len(journal.rows) == (int(p50) - 1 if keep else 0)
        journal.add([row(p50=p50, provider=provider)])
        journal.close()
    rows = load(str(tmp_path))
    assert [r.p50 for r in rows] == [1.0, 2.0, 3.0]
    assert [(r.provider, r.p50) for r in newest(rows)] == [("a", 3.0), ("b", 2.0)]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.skipif(sys.platform == "win32", reason="locks")
def test_a_second_run_into_a_folder_is_refused_until_the_first_ends(tmp_path):
    first = Journal(tmp_path / FILE)
    first.add([row(p50=1.0)])
    for keep in (False, True):
        with pytest.raises(BlockingIOError, match=rf"{FILE}: another run writes into it"):
            Journal(tmp_path / FILE, keep=keep)
    Journal(tmp_path / "part.jsonl").close()  # other files of the folder are free
    first.add([row(p50=2.0)])
    first.close()
    Journal(tmp_path / FILE).close()
    assert [r.p50 for r in load(str(tmp_path))] == [1.0, 2.0]


@pytest.mark.parametrize(("cut", "rest"), [(1, 2), (40, 1)])
def test_a_run_behind_a_kill_begins_a_line(cut, rest, tmp_path):
    """Of two rows the last has lost its end: the line's alone, or half of the row."""
    text = 2 * (row(p50=1.0).to_json() + "\n")
    (tmp_path / FILE).write_text(text[:-cut])
    journal = Journal(tmp_path / FILE)
    journal.add([row(p50=2.0)])
    journal.close()
    assert [r.p50 for r in load(str(tmp_path))] == [1.0] * rest + [2.0]


def test_a_line_that_a_crash_cut_off_is_left_out_and_no_other():
    line = row().to_json()
    assert len(parse(f"{line}\n{line[:40]}")) == 1
    with pytest.raises(json.JSONDecodeError):
        parse(f"{line[:40]}\n{line}")


def test_results_of_a_commit(tmp_path):
    def git(*args):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True)

    git("init")
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    for p50 in (1.0, 2.0):
        (folder / "cpu.jsonl").write_text(row(p50=p50).to_json() + "\n")
        git("add", ".")
        git("commit", "-m", "results")
    assert [r.p50 for r in load("HEAD~1", tmp_path)] == [1.0]
    assert [r.p50 for r in load("HEAD", tmp_path)] == [2.0]
    with pytest.raises(ValueError, match="neither a file"):
        load("no-such-commit", tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        load(str(tmp_path))
