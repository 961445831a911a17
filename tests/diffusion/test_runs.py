"""Runs in a folder: interrupted, gone on with, sampled from; and the commands over them."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from vdcore.cli.commands import app
from vdcore.diffusion import runs, training
from vdcore.diffusion.data import Scenes
from vdcore.diffusion.measure import goes_on_better, measure_continued
from vdcore.diffusion.training import Recipe, load_trained
from vdcore.models import VDiTConfig
from vdcore.video.files import read_clip, write_video
from vdcore.video.scenes import MovingShapes

MODEL = VDiTConfig(in_channels=3, patch=(1, 4, 4), width=16, depth=1, heads=2, position="sincos+rope", qk_norm=True)
RECIPE = Recipe(model=MODEL, frames=4, size=(8, 8), batch=2, steps=9, warmup=2, hold=0.5)
SCENES = Scenes(MovingShapes(frames=4, size=(8, 8), objects=1, occluders=0, radius=(2.0, 3.0)))
TINY = ["--frames", "4", "--size", "9", "--batch", "2", "--width", "16", "--depth", "1", "--heads", "2", "--steps", "6"]


def cli(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, result.output


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_an_interrupt_loses_nothing(number, tmp_path):
    whole = runs.train(RECIPE, SCENES, tmp_path / "whole")
    assert whole.finished and whole.step == 9 and list(whole.losses) == list(range(9))

    def interrupt(step, loss):
        if step == 5:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    first = runs.train(RECIPE, SCENES, tmp_path / "two", on_step=interrupt)
    assert signal.getsignal(number) is handler
    assert not first.finished and first.step == 5 and load_trained(first.checkpoint).step == 5
    seen = []
    second = runs.train(RECIPE, SCENES, tmp_path / "two", on_step=lambda step, loss: seen.append(step))
    assert second.finished and second.losses == whole.losses
    assert seen == [5, 6, 7, 8, 9]
    assert second.checkpoint.read_bytes() == whole.checkpoint.read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "two" / runs.LOSSES).read_text().splitlines()]
    assert {row["step"]: row["loss"] for row in rows} == whole.losses


def test_a_crash_costs_the_steps_since_the_last_checkpoint_and_no_more(tmp_path):
    """The process dies at step 7, with a line of its log cut off; the checkpoint is of step 6."""
    whole = runs.train(RECIPE, SCENES, tmp_path / "whole")

    def die(step, loss):
        if step == 7:
            raise MemoryError

    with pytest.raises(MemoryError):
        runs.train(RECIPE, SCENES, tmp_path / "two", save_every=3, on_step=die)
    with (tmp_path / "two" / runs.LOSSES).open("a") as log:
        log.write('{"step": 7, "lo')
    assert load_trained(tmp_path / "two" / runs.CHECKPOINT).step == 6
    again = runs.train(RECIPE, SCENES, tmp_path / "two", save_every=3)
    assert again.losses == whole.losses
    assert again.checkpoint.read_bytes() == whole.checkpoint.read_bytes()


def test_fresh_begins_anew_and_finished_does_nothing(tmp_path):
    first = runs.train(RECIPE, SCENES, tmp_path)
    steps = []
    assert runs.train(RECIPE, SCENES, tmp_path, on_step=lambda step, loss: steps.append(step)).losses == first.losses
    assert steps == [9]
    assert runs.train(RECIPE, SCENES, tmp_path, fresh=True, on_step=lambda step, loss: steps.append(step)).finished
    assert steps == [9, *range(10)]


def test_drawing_videos(tmp_path):
    trained = load_trained(runs.train(RECIPE, SCENES, tmp_path).checkpoint)
    video = runs.draw_videos(trained, 2, steps=3)
    assert video.shape == (2, 3, 4, 8, 8) and video.min() >= 0 and video.max() <= 1
    assert torch.equal(video, runs.draw_videos(trained, 2, steps=3))
    assert not torch.equal(video, runs.draw_videos(trained, 2, steps=3, seed=1))
    progress = []
    long = runs.draw_videos(
        trained, 2, frames=9, steps=3, overlap=1, on_clip=lambda done, of: progress.append((done, of))
    )
    assert long.shape == (2, 3, 9, 8, 8) and torch.equal(long[:, :, :4], video)
    assert progress == [(4, 9), (7, 9), (9, 9)]
    real = runs.real_clips(trained, 5)
    assert real.shape == (5, 3, 4, 8, 8)


def test_long_videos_need_a_model_that_knows_held_frames(tmp_path):
    from dataclasses import replace

    trained = load_trained(runs.train(replace(RECIPE, hold=0.0, steps=1), SCENES, tmp_path).checkpoint)
    with pytest.raises(ValueError, match=r"frames must be at most 4 where the model was trained without held frames"):
        runs.draw_videos(trained, 1, frames=5)


# ---- The commands ----


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    code, output = cli("train", "--out", out, *TINY)
    assert code == 0, output
    return out


def test_train_and_sample(trained_folder, tmp_path):
    assert {"checkpoint.safetensors", "losses.jsonl", "losses.png"} <= {p.name for p in trained_folder.iterdir()}
    code, output = cli(
        "sample", trained_folder / "checkpoint.safetensors", "--out", tmp_path, "--count", 2, "--steps", 2
    )
    assert code == 0, output
    assert "warping_error" in output and "moves as real clips do" in output
    assert read_clip(tmp_path / "sample-01.mp4").shape == (3, 4, 72, 72)
    assert (tmp_path / "samples.png").stat().st_size > 1000
    found = json.loads((tmp_path / "measures.json").read_text())
    assert found["samples"]["mean_flow"] > 0 and found["real"]["warping_error"] > 0
    assert found["error_ratio"] == pytest.approx(found["samples"]["warping_error"] / found["real"]["warping_error"])
    assert found["moves_as_real"] == (found["error_ratio"] <= 2 and 0.5 <= found["motion_ratio"] <= 2)
    assert "first half of a real clip" in output and "goes on better than what takes no model" in output
    assert list(found["continued"]) == ["real", "samples", "still frame", "first half again", "noise"]


def test_what_goes_on_is_held_against_what_takes_no_model():
    real = training.SCENES.batch(6, torch.Generator().manual_seed(0)).video
    drifted = real.clone()
    drifted[:, :, 4:] = 0.9 * real[:, :, 4:] + 0.1 * real[:, :, 3:4]
    found = measure_continued(real, drifted, 4)
    assert found["real"].difference == 0 < found["samples"].difference < found["still frame"].difference
    assert found["real"].warping_error < found["samples"].warping_error < found["still frame"].warping_error
    assert found["first half again"].warping_error > found["samples"].warping_error
    assert found["noise"].warping_error > 10 * found["still frame"].warping_error
    assert goes_on_better(found)
    assert not goes_on_better(measure_continued(real, real[:, :, [0, 1, 2, 3, 3, 3, 3, 3]], 4)), "a still frame"


def test_clips_are_gone_on_with_from_their_first_half(trained_folder):
    trained = load_trained(trained_folder / "checkpoint.safetensors")
    clips = runs.real_clips(trained, 2)
    video, known = runs.continue_clips(trained, clips, steps=2)
    assert known == 2 and video.shape == clips.shape
    assert torch.allclose(video[:, :, :2], clips[:, :, :2], atol=1e-6) and not torch.equal(video, clips)
    assert runs.continue_clips(replace(trained, recipe=replace(trained.recipe, hold=0.0)), clips) is None


def test_films_are_learned_with_positions_that_tokens_carry(tmp_path):
    write_video(tmp_path / "one.mp4", torch.rand(3, 9, 16, 16, generator=torch.Generator().manual_seed(0)))
    tiny = ["--steps", "1", "--batch", "1", "--size", "8", "--width", "16", "--depth", "1", "--heads", "2"]
    for options, position in ((), "sincos+rope"), (("--position", "rope"), "rope"):
        code, output = cli("train", tmp_path / "one.mp4", "--out", tmp_path / position, *options, *tiny)
        assert code == 0, output
        recipe = load_trained(tmp_path / position / "checkpoint.safetensors").recipe
        assert recipe.model.position == position and recipe.model.patch == (2, 4, 4)


def test_sample_gifs_longer_than_the_clips(trained_folder, tmp_path):
    code, output = cli(
        *("sample", trained_folder / "checkpoint.safetensors", "--out", tmp_path, "--count", 1, "--steps", 2),
        *("--frames", 10, "--format", "gif"),
    )
    assert code == 0, output
    assert read_clip(tmp_path / "sample-00.gif").shape[1] == 10


def test_train_on_files(tmp_path):
    video = torch.rand(3, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "clips" / "one.mp4", video)
    code, output = cli("train", tmp_path / "clips", "--out", tmp_path / "out", *TINY, "--patch", 3)
    assert code == 0, output
    sample = ("sample", tmp_path / "out" / "checkpoint.safetensors", "--count", 2, "--steps", 1, "--out", tmp_path)
    code, output = cli(*sample)
    assert code == 0 and "warping_error" in output, output
    (tmp_path / "clips" / "one.mp4").unlink()
    code, output = cli(*sample)
    assert code == 0 and "not measured: the clips of training are not here" in output


@pytest.mark.parametrize(
    "args,message",
    (
        (("train", "{}/nowhere.mp4"), "nowhere.mp4: no such file or folder"),
        (("train", "{}/short.mp4"), "short.mp4: 2 frames at stride 1, wanted 4"),
        (("train", "{}/text.mp4"), "text.mp4: not a video file"),
        (("train", "{}/empty"), "empty: no video"),
        (("train", "--size", "10"), "height must be a multiple of the patch size 3, got 10"),
        (("train", "--heads", "3"), "heads must divide width = 16, got 3"),
        (("train", "--attention", "sparse"), "attention must be one of"),
        (("train", "--target", "noise"), "target must be one of sample, flow, v_prediction, epsilon, got 'noise'"),
        (("sample", "{}/nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("sample", "{}/text.mp4"), "text.mp4: not a whole safetensors file"),
    ),
)
def test_bad_input_is_one_line_and_leaves_no_checkpoint(args, message, tmp_path):
    write_video(tmp_path / "short.mp4", torch.zeros(3, 2, 16, 16))
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    filled = [a.format(tmp_path) for a in args]
    tiny = [] if args[0] == "sample" else [*TINY, "--patch", "3"]
    code, output = cli(filled[0], *tiny, *filled[1:], "--out", tmp_path / "out")
    assert code == 1
    assert message in output and output.startswith("vdcore: ") and "Traceback" not in output
    assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_recipe_is_not_written_over(trained_folder):
    before = (trained_folder / "checkpoint.safetensors").read_bytes()
    code, output = cli("train", "--out", trained_folder, *TINY, "--lr", "0.1")
    assert code == 1 and "trained with another recipe: lr 0.003, now 0.1" in output
    assert (trained_folder / "checkpoint.safetensors").read_bytes() == before


def test_unknown_format(trained_folder):
    code, output = cli("sample", trained_folder / "checkpoint.safetensors", "--format", "avi")
    assert code == 2 and "known are mp4, gif" in output
