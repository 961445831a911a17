"""Workloads, and how they are cut to a machine."""

import pytest

from vdcore import FrameMask
from vdcore_bench.jobs import JOBS, make
from vdcore_bench.workloads import Budget, load, scaled


def test_the_file_is_read_whole():
    assert len(load()) >= 25
    for name, workload in load().items():
        shape = workload.shape()
        assert workload.tokens_per_frame == shape.S, name
        assert shape.H % shape.G == 0, name
        assert set(workload.ops) <= set(JOBS), name


@pytest.mark.parametrize("name", sorted(load()))
def test_every_operator_of_every_workload_is_cut_to_the_budget(name):
    workload, budget = load()[name], Budget(1e9, 50e6)
    for op in workload.ops:
        if JOBS[op].why_not(workload):
            continue
        job = make(op, workload, budget=budget)
        assert job.forward_flops() <= budget.flops and job.traffic() <= budget.bytes, op
        assert job.original == workload.shape()
        assert workload.head_dim == job.shape.D, "the head dimension decides which kernel runs"


def test_a_workload_that_fits_is_not_cut():
    job = make("temporal_attention", load()["latte-1-512"], budget=Budget.unlimited())
    assert job.shape == job.original
    assert job.shape.describe(job.original) == "frames 16, tokens 1024, heads 16"


def test_the_cut_is_written_down():
    workload = load()["stdit3-720p-102f"]
    shape = scaled(workload.shape(), ("rows",), lambda s: s.S <= 720)
    shape = scaled(shape, ("heads",), lambda s: s.H <= 4)
    assert shape.describe(workload.shape()) == "frames 30, tokens 3600 -> 720, heads 16 -> 4"


def test_grouped_heads_stay_grouped_as_they_were():
    shape = load()["latte-1-512"].shape()
    shape = scaled(type(shape)(**{**shape.__dict__, "G": 4}), ("heads",), lambda s: s.H <= 8)
    assert (shape.H, shape.G) == (8, 2)


def test_a_shape_that_cannot_be_cut_far_enough_is_returned():
    shape = load()["latte-1-512"].shape()
    assert scaled(shape, ("heads", "rows", "T"), lambda s: False).T == 1


def test_masks_are_those_of_the_models():
    assert load()["self-forcing-1.3b"].mask == FrameMask(future=0, chunk=3)
    assert load()["long-video-120f"].mask == FrameMask.window(30)
    assert load()["wan2.2-5b-704p"].mask == FrameMask.full()
