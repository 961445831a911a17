"""Figures: what is saved is what is loaded, and nothing that is no result can be saved."""

import json

import numpy as np
import pytest
import torch

from experiments.figure import Figure
from vdcore_bench.report.table import Table


def figure(**changes) -> Figure:
    values = {
        "name": "answer",
        "claim": "It is 42.",
        "numbers": {"found": 42, "curve": [0.5, 1.0], "by": {"v=1": 1.5}},
        "compared_with": {"expected": 42},
        "passed": True,
        "size": "one number",
    }
    return Figure(**{**values, **changes})


def test_saved_and_loaded(tmp_path):
    (tmp_path / "plot.png").touch()
    saved = figure(files=["plot.png"], captions={"plot.png": "Forty and two."})
    assert saved.save(tmp_path) == saved == Figure.load(tmp_path / "answer.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answer.json", "plot.png"]


def test_numbers_of_torch_and_numpy(tmp_path):
    numbers = {"a": torch.tensor(0.1), "b": np.float32(2 / 3), "c": np.int64(3), "d": (True, None), "e": np.bool_(True)}
    figure(numbers=numbers).save(tmp_path)
    found = Figure.load(tmp_path / "answer.json").numbers
    assert found == {
        "a": 0.1,
        "b": 0.666667,
        "c": 3,
        "d": [True, None],
        "e": True,
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(torch.nan)])
def test_what_is_no_number_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="Figure answer, numbers, found: must be finite"):
        figure(numbers={"found": value}).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Figure answer: files must be in .*, missing plot\.png"):
        figure(files=["plot.png"]).save(tmp_path)


def test_pictures_without_a_caption_are_refused(tmp_path):
    (tmp_path / "plot.png").touch()
    with pytest.raises(ValueError, match=r"captions must say what pictures show, missing \['plot\.png'\]"):
        figure(files=["plot.png"], captions={"other.png": "Another."}).save(tmp_path)
    assert not (tmp_path / "answer.json").exists()


def test_other_files_are_no_figures(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Figure.load(path)
    path.write_text('{"name": "a"}')
    with pytest.raises(ValueError, match="must hold captions, claim, compared_with"):
        Figure.load(path)


def test_a_table_is_kept_and_written_as_markdown(tmp_path, capsys):
    table = Table.of(["net", "share"], [["on", 0.12345], ["off", "-"]], note="Shares.")
    saved = figure(table=table).save(tmp_path)
    assert saved.table == table and saved.files == ["answer.md"]
    expected = "Shares.\n\n| net | share |\n| --- | ---: |\n| on | 0.123 |\n| off | - |\n"
    assert (tmp_path / "answer.md").read_text() == expected
    assert "0.123" in capsys.readouterr().out


def test_figures_from_before_there_were_tables_and_captions(tmp_path):
    path = tmp_path / "answer.json"
    figure().save(tmp_path)
    values = json.loads(path.read_text())
    del values["table"], values["captions"]
    path.write_text(json.dumps(values))
    assert Figure.load(path) == figure()
