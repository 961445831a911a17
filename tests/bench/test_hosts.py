"""Blocks of diffusers before and after the swap, as rows of results."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")

from vdcore_bench.measure.journal import FILE, Journal, parse
from vdcore_bench.suites.models import host_blocks, hosts, vdit
from vdcore_bench.suites.sweep import Settings

NAME = "SVD temporal block"


@pytest.fixture
def small(monkeypatch):
    """The block at a size for tests."""
    monkeypatch.setitem(host_blocks.BLOCKS, NAME, replace(host_blocks.BLOCKS[NAME], small=(3, 2, 4)))


def test_a_block_is_measured_with_its_peers(tmp_path, small):
    journal = Journal(tmp_path / "results.jsonl")
    rows = hosts.compare(NAME, [torch.float32], 3, journal)
    assert [row.provider for row in rows[::2]] == list(hosts.PROVIDERS)
    for timed, memory in zip(rows[::2], rows[1::2]):
        assert timed.metric == "time" and timed.p20 <= timed.p50 <= timed.p80 and timed.error_ratio <= 1
        assert memory.metric == "memory" and memory.p50 >= 0
        assert timed.shape == {"T": 3, "H": 2, "W": 4} == memory.shape
    assert len({row.key() for row in rows}) == len(rows) == len((tmp_path / "results.jsonl").read_text().splitlines())
    assert [line[2] for line in hosts.cells(rows)] == list(hosts.PROVIDERS)


@pytest.mark.parametrize("name", hosts.blocks())
def test_memory_is_predicted_without_running(name):
    few, many = (hosts.predict_memory(hosts.HostPoint(name, "diffusers", n)) for n in (2, 20))
    assert 5 < many / few < 15  # what does not grow with frames is the text's


def test_prediction_is_near_what_is_measured():
    point = hosts.HostPoint("SVD temporal block", "vdcore", 2)
    measured = hosts.measure_memory(point).bytes
    assert 0.5 < measured / hosts.predict_memory(point) < 2


def test_what_does_not_fit_is_predicted(tmp_path):
    journal = Journal(tmp_path / "results.jsonl")
    rows = hosts.profile("SVD temporal block", Settings(frames=(2,), memory_limit=2**20), journal)
    assert [(row.provider, row.metric, row.status) for row in rows] == [
        (provider, metric, "predicted") for provider in ("diffusers", "vdcore") for metric in ("memory", "time")
    ]
    assert all("the limit is 1 MiB" in row.reason for row in rows)


@pytest.mark.parametrize("command", ["bench", "profile"])
def test_unknown_names_end_with_2_and_the_known_ones(command, invoke):
    text = invoke(command, "--model", "NoSuchModel", code=2)
    assert "NoSuchModel: not known" in text and "SVD temporal block" in text


@pytest.mark.parametrize("name", hosts.models())
def test_a_model_names_its_block(name):
    point = hosts.HostPoint(name)
    assert point.row().workload == point.full_name in hosts.blocks()


def test_bench_of_a_model_from_the_command_line(tmp_path, invoke, small):
    text = invoke("bench", "--model", "SVD", "--rounds", "3", "--out", tmp_path)
    assert "Models before and after the swap" in text and "diffusers, naive attention" in text
    rows = parse((tmp_path / FILE).read_text())
    assert {row.status for row in rows} == {"ok"} and len(rows) == 2 * len(hosts.PROVIDERS)
    assert {row.workload for row in rows} == {NAME}


@pytest.mark.slow
def test_profile_of_blocks_and_variants_from_the_command_line(tmp_path, invoke, in_this_process):
    """Of both kinds together; few frames are measured, many would not fit."""
    names = ["SVD temporal block", "vdit-windowed"]
    limits = ("--frames", "2,128", "--attention", "naive,vdcore", "--memory-limit", "200MiB", "--time-limit", "9999")
    text = invoke("profile", "--model", ",".join(names), *limits, "--out", tmp_path)
    assert all(name in text for name in names)
    rows = parse((tmp_path / FILE).read_text())
    assert {(r.workload, r.provider, r.x, r.metric, r.status) for r in rows} == {
        (name, who, frames, metric, status)
        for name in names
        for who in ("naive" if name in vdit.VARIANTS else "diffusers", "vdcore")
        for frames, status in ((2, "ok"), (128, "predicted"))
        for metric in ("memory", "time")
    }
    assert all(row.p50 > 0 for row in rows if row.metric == "time" or row.status == "predicted")
    assert all("the limit is 200 MiB" in row.reason for row in rows if row.status == "predicted")


def test_more_frames_than_a_host_takes_are_rows_with_its_reason(tmp_path):
    """AnimateDiff's table of positions ends at 32."""
    settings = Settings(frames=(33,), dtype=torch.float32, device="cpu")
    rows = hosts.profile("AnimateDiff motion module", settings, Journal(tmp_path / FILE))
    assert [row.status for row in rows] == ["failed"] * 4
    assert all(row.reason and "32" in row.reason for row in rows)
