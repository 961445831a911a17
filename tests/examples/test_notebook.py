"""The notebook's cells run from top to bottom, without Jupyter, and it is committed without results."""

import json
from pathlib import Path

import pytest
from matplotlib import pyplot

from vdcore.video import read_clip

NOTEBOOK = Path(__file__).parents[2] / "examples" / "train_and_sample.ipynb"


@pytest.fixture
def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_it_trains_and_samples(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend("Agg")
    text, found = "\n".join("".join(cell["source"]) for cell in cells), {}
    few = text.replace("STEPS, WIDTH = 100, 96", "STEPS, WIDTH = 12, 48")
    assert few != text
    exec(compile(few, NOTEBOOK.name, "exec"), found)
    pyplot.close("all")
    losses = found["losses"]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    assert tuple(found["videos"].shape[:3]) == (2, 3, 20)
    assert read_clip(tmp_path / "out/notebook/sample.gif").shape[:2] == (3, 20)


def test_it_has_no_results_in_it(cells):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
