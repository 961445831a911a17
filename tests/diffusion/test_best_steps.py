"""Steps of the sampler that a training run measures, keeps beside its checkpoint, and sample takes."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from vdcore.cli import train as train_command
from vdcore.cli.commands import app
from vdcore.diffusion import best_steps, measure, runs
from vdcore.diffusion.best_steps import BestSteps, measure_steps
from vdcore.diffusion.training import SCENES, Recipe, Trained
from vdcore.models import VDiT, VDiTConfig

MODEL = VDiTConfig(in_channels=3, patch=(1, 4, 4), width=16, depth=1, heads=2, position="rope")
RECIPE = Recipe(model=MODEL, frames=4, size=(24, 24), steps=7)
TINY = ["--frames", "4", "--size", "9", "--batch", "2", "--width", "16", "--depth", "1", "--heads", "2", "--steps", "2"]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(best_steps, "CLIPS", 4)
    monkeypatch.setattr(best_steps, "TRIED", (1, 2, 4))


def scenes(seed):
    return replace(SCENES, frames=4).batch(4, torch.Generator().manual_seed(seed)).video


def test_the_best_is_what_was_measured(few, monkeypatch):
    """Real clips from 2 steps are better than noise, though 4 steps hold together; 1 step goes on with truth."""
    real, noise, tried = scenes(0), torch.rand(4, 3, 4, 24, 24, generator=torch.Generator().manual_seed(0)), []
    still = real[:, :, :1].expand_as(real)
    monkeypatch.setattr(best_steps, "real_clips", lambda trained, count: torch.cat((real, scenes(1))))
    monkeypatch.setattr(
        best_steps, "draw_videos", lambda *args, steps, **given: {1: noise, 2: scenes(2), 4: still}[steps]
    )
    monkeypatch.setattr(
        best_steps, "continue_clips", lambda trained, clips, steps, **given: ({1: clips}.get(steps, noise), 2)
    )
    trained = Trained(VDiT(MODEL), RECIPE, 7)
    assert measure_steps(trained, on_tried=tried.append) == BestSteps(draw=2, go_on=1, step=7)
    assert tried == [1, 2, 4]
    monkeypatch.setattr(best_steps, "continue_clips", lambda *args, **given: None)
    assert measure_steps(trained).go_on == 2, "of a model that goes on with nothing"
    monkeypatch.setattr(best_steps, "real_clips", lambda trained, count: None)
    assert measure_steps(trained) is None


def test_it_is_kept_for_the_step_that_it_was_measured_at(tmp_path):
    best_steps.save(BestSteps(4, 2, 500), tmp_path)
    assert best_steps.load(tmp_path / runs.CHECKPOINT, 500) == BestSteps(4, 2, 500)
    assert best_steps.load(tmp_path / runs.CHECKPOINT, 750) is None
    assert best_steps.load(tmp_path / "elsewhere" / runs.CHECKPOINT, 500) is None


def test_train_measures_and_sample_takes_it(few, tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, "LEAST_STEPS", 2)
    monkeypatch.setattr(best_steps, "TRIED", (3,))
    monkeypatch.setattr(measure, "REAL_CLIPS", 4)

    def cli(*args):
        result = CliRunner().invoke(app, [str(a) for a in args])
        assert result.exit_code == 0, result.output
        return result.output

    assert "best steps of the sampler: 3 from noise, 3 to go on with a clip" in cli("train", "--out", tmp_path, *TINY)
    assert json.loads((tmp_path / best_steps.FILE).read_text()) == {"draw": 3, "go_on": 3, "step": 2}
    assert "best steps" not in cli("train", "--out", tmp_path, *TINY), "once"
    sample = ("sample", tmp_path / runs.CHECKPOINT, "--out", tmp_path / "sample", "--count", 2)
    assert "by 3 steps" in cli(*sample)
