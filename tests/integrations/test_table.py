"""The table of models and the measurements that it is made of."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

import table
from host_runs import MODELS

from vdcore.testing import error_ratio
from vdcore_bench.measure.memory import peak_of, predicted_peak
from vdcore_bench.suites.models.host_blocks import BLOCKS
from vdcore_bench.suites.models.hosts import HostPoint, exact


def test_rows(capsys):
    assert table.main(["SanaVideo", "--rounds", "1"]) == 0
    header, _, row = capsys.readouterr().out.strip().splitlines()[-3:]
    cells = dict(zip(header.split(" | "), row.split(" | ")))
    assert cells["calls"] == "2" and cells["served"] == "2 (2 cross)" and cells["left to torch"] == "0"
    assert "SanaLinearAttnProcessor3_0" in cells["why"]
    assert 0 < float(cells["error float32"]) <= 1


PAGE = Path(__file__).parents[2] / "docs" / "diffusers.md"
NEAR = ("Latte", "SVD", "Wan", "SanaVideo", "Mochi", "HunyuanVideo")  # every kind of swap; the rest nightly


def rows_of_the_page():
    """Model -> calls, served, left to torch and why, as docs/diffusers.md has them."""
    lines = PAGE.read_text().partition("| model | calls |")[2].partition("\n\n")[0].splitlines()[2:]
    return {cells[0]: cells[1:5] for cells in ([x.strip() for x in line.strip("|").split("|")] for line in lines)}


def test_the_page_has_every_model():
    assert list(rows_of_the_page()) == list(MODELS)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in NEAR else pytest.mark.slow) for n in MODELS])
def test_the_page_says_what_is_served_and_what_is_left(name):
    """`python tests/integrations/table.py` makes it anew."""
    row = table.calls_row(name)
    assert rows_of_the_page()[name] == [row[column] for column in ("calls", "served", "left to torch", "why")]


def test_unknown_names_are_answered_with_the_known(capsys):
    assert table.main(["NoSuchModel"]) == 2
    assert "Latte" in capsys.readouterr().err


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_real_width_are_the_hosts(name):
    host, ours = (HostPoint(name, provider, 3, grid=(2, 4)) for provider in ("diffusers", "vdcore"))
    assert host.size() == (3, 2, 4)
    assert error_ratio(ours.make().call(), exact(host), [host.make().call()]).worst <= 1


def test_peak_memory_is_that_of_the_call():
    size = 64 * 2**20

    def call():
        return torch.ones(size // 4).sum()

    call()
    found = peak_of(call).bytes
    assert 0.8 * size < found < 2 * size


def test_memory_is_predicted_without_running():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model = MODELS["Wan"].build()
        given = MODELS["Wan"].inputs()
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        found = predicted_peak(model, lambda: model(**given))
    assert 0 < found < 100 * parameters
