"""The table of models and the measurements that it is made of."""

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
