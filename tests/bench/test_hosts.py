"""Models of diffusers before and after the swap, as rows of results."""

import pytest
import torch

pytest.importorskip("diffusers")

from typer.testing import CliRunner
from vdcore.bench import hosts
from vdcore.bench.results import Journal

from vdcore.cli import app


def test_a_model_is_measured_with_its_peers(tmp_path):
    journal = Journal(tmp_path / "results.jsonl")
    rows = hosts.compare("SanaVideo", [torch.float32], 3, journal)
    assert [row.provider for row in rows[::2]] == list(hosts.PROVIDERS)
    for timed, memory in zip(rows[::2], rows[1::2]):
        assert timed.metric == "time" and timed.p20 <= timed.p50 <= timed.p80 and timed.error_ratio <= 1
        assert memory.metric == "memory" and memory.p50 >= 0
        assert timed.shape == {"T": 3} == memory.shape
    assert len({row.key() for row in rows}) == len(rows) == len((tmp_path / "results.jsonl").read_text().splitlines())
    assert [line[2] for line in hosts.cells(rows)] == list(hosts.PROVIDERS)


@pytest.mark.parametrize("name", hosts.blocks())
def test_memory_is_predicted_without_running(name):
    few, many = (hosts.predict_memory(hosts.HostPoint(name, "diffusers", n)) for n in (2, 20))
    assert 5 < many / few < 15  # what does not grow with frames is the text's


def test_prediction_is_near_what_is_measured():
    point = hosts.HostPoint("SVD temporal block", "vdcore", 2)
    measured = hosts.measure(point, 1)[0]
    assert 0.5 < measured / hosts.predict_memory(point) < 2


def test_what_does_not_fit_is_predicted(tmp_path):
    journal = Journal(tmp_path / "results.jsonl")
    rows = hosts.profile("SVD temporal block", [2], torch.float32, 2**20, 10.0, journal)
    assert [(row.provider, row.metric, row.status) for row in rows] == [
        (provider, metric, "predicted") for provider in ("diffusers", "vdcore") for metric in ("memory", "time")
    ]
    assert all("the limit is 1 MiB" in row.reason for row in rows)


@pytest.mark.parametrize("command", ["bench", "profile"])
def test_unknown_names_end_with_2_and_the_known_ones(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [command, "--model", "NoSuchModel"])
    assert result.exit_code == 2
    assert "NoSuchModel: not known" in result.output and "SVD temporal block" in result.output
