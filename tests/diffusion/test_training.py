"""Training: it learns, it resumes bit for bit, and no checkpoint is ever half there."""

import json
import os
from dataclasses import replace

import pytest
import torch

from vdcore import FrameMask
from vdcore.diffusion import checkpoint
from vdcore.diffusion.checkpoint import CheckpointError
from vdcore.diffusion.data import Scenes
from vdcore.diffusion.runs import draw_videos
from vdcore.diffusion.training import TARGETS, Recipe, Trainer, draw_held, draw_timesteps, load_trained, process_for
from vdcore.models import VDiTConfig
from vdcore.video.scenes import MovingShapes

MODEL = VDiTConfig(in_channels=3, patch=(1, 4, 4), width=16, depth=1, heads=2, position="sincos+rope", qk_norm=True)
SCENES = Scenes(MovingShapes(frames=4, size=(8, 8), objects=1, occluders=0, radius=(2.0, 3.0)))


def recipe(**given):
    values = {"model": MODEL, "frames": 4, "size": (8, 8), "batch": 3, "steps": 12, "warmup": 3, "hold": 0.5}
    return Recipe(**{**values, "forcing": 0.3, **given})


@pytest.mark.parametrize("target", TARGETS)
def test_resuming_gives_the_losses_of_an_uninterrupted_run(target, tmp_path):
    whole = Trainer(recipe(target=target), SCENES)
    losses = [whole.step() for _ in range(8)]
    first = Trainer(recipe(target=target), SCENES)
    assert [first.step() for _ in range(5)] == losses[:5]
    first.save(tmp_path / "c.safetensors")
    torch.manual_seed(99)  # whatever else the process draws is of no matter
    second = Trainer(recipe(target=target), SCENES)
    second.restore(tmp_path / "c.safetensors")
    assert [second.step() for _ in range(3)] == losses[5:]
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters()):
        assert torch.equal(a, b), name
    assert all(torch.equal(whole.average[name], second.average[name]) for name in whole.average)


CAUSAL = replace(MODEL, mask=FrameMask(past=1, future=0, chunk=2), position="rope", attention="full")


def causal(**given):
    return recipe(**{"model": CAUSAL, "causal": True, "hold": 0.0, "forcing": 0.0, **given})


def test_teacher_forcing_goes_on_from_a_checkpoint_and_rolls(tmp_path):
    whole = Trainer(causal(), SCENES)
    losses = [whole.step() for _ in range(4)]
    first = Trainer(causal(), SCENES)
    assert [first.step() for _ in range(2)] == losses[:2]
    first.save(tmp_path / "c.safetensors")
    second = Trainer(causal(), SCENES)
    second.restore(tmp_path / "c.safetensors")
    assert [second.step() for _ in range(2)] == losses[2:]
    trained = load_trained(tmp_path / "c.safetensors")
    assert trained.recipe == causal()
    long = draw_videos(trained, 2, frames=11, steps=2)
    assert long.shape == (2, 3, 11, 8, 8)
    assert torch.equal(long[:, :, :4], draw_videos(trained, 2, frames=4, steps=2)), "what follows changes nothing"


def test_chunks_have_timesteps_of_their_own(monkeypatch):
    """And the loss is that of every chunk after its clean prefix."""
    trainer, seen = Trainer(causal(), SCENES), {}
    forward = trainer.model.forward

    def note(video, timestep, **given):
        seen.update(timestep=timestep, **given)
        return forward(video, timestep, **given)

    monkeypatch.setattr(trainer.model, "forward", note)
    trainer.step()
    timestep = seen["timestep"]
    assert timestep.shape == (3, 4) and torch.equal(timestep[:, ::2], timestep[:, 1::2])
    assert not torch.equal(timestep[:, 0], timestep[:, 2])
    assert seen["history"].shape == (3, 3, 4, 8, 8) and not seen["history_timestep"].any()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"hold": 0.5}, "hold and forcing must be 0 with causal, got 0.5 and 0.0"),
        ({"model": MODEL}, "causal needs a mask with future=0 and neither sink nor shots"),
    ],
)
def test_what_teacher_forcing_cannot_be(given, message):
    with pytest.raises(ValueError, match=f"Recipe: {message}"):
        causal(**given)


def test_it_learns_one_clip():
    """A model that sees one clip learns it; what it predicts at half noise is far nearer than what it began with."""

    class OneClip:
        clip = SCENES.batch(1, torch.Generator().manual_seed(0))

        def batch(self, count, generator):
            return self.clip.expand(count, -1, -1, -1, -1)

        def describe(self):
            return {"kind": "one clip"}

    trainer = Trainer(recipe(steps=150, hold=0.0, forcing=0.0, lr=1e-2), OneClip())
    losses = [trainer.step() for _ in range(150)]
    assert sum(losses[-20:]) < 0.25 * sum(losses[:20])


def test_the_average_and_the_learning_rate():
    trainer = Trainer(recipe(ema=0.5, warmup=4, steps=12), SCENES)
    expected, factors = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, []
    for n in range(6):
        trainer.step()
        factors.append(trainer.optimizer.param_groups[0]["lr"] / trainer.recipe.lr)
        decay = min(0.5, (2 + n) / (11 + n))
        for name, p in trainer.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 7 / 8])
    for name, x in trainer.average.items():
        torch.testing.assert_close(x, expected[name])


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    class Broken:
        def batch(self, count, generator):
            return torch.full((count, 3, 4, 8, 8), float("nan"))

        def describe(self):
            return {}

    trainer = Trainer(recipe(), Broken())
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_the_averaged_model_is_what_is_sampled_from(tmp_path):
    trainer = Trainer(recipe(), SCENES)
    for _ in range(3):
        trainer.step()
    trained = load_trained(trainer.save(tmp_path / "deep" / "c.safetensors"))
    assert trained.step == 3 and trained.recipe == trainer.recipe and trained.source["kind"] == "scenes"
    for name, p in trained.model.named_parameters():
        assert torch.equal(p, trainer.average[name])
        assert not torch.equal(p, dict(trainer.model.named_parameters())[name])


def test_held_frames(generator):
    held = draw_held(3000, 8, 0.6, generator)
    chosen = held.any(1)
    assert chosen.float().mean() == pytest.approx(0.6, abs=0.05)
    both = held[:, -1]
    assert both.sum() / chosen.sum() == pytest.approx(1 / 3, abs=0.05)
    ends = torch.tensor((True, *[False] * 6, True))
    assert all(torch.equal(row, ends) for row in held[both])
    counts = held[chosen & ~both].sum(1)
    assert counts.unique().tolist() == [1, 2, 3, 4]
    assert torch.equal(held[chosen & ~both], torch.arange(8) < counts[:, None])
    assert not draw_held(100, 8, 0.0, generator).any()
    assert not draw_held(100, 1, 1.0, generator).any()  # something is left to predict


@pytest.mark.parametrize("target", TARGETS)
def test_timesteps(target, generator):
    process = process_for(target)
    t = draw_timesteps(process, (4000,), generator)
    assert t.min() >= 0 and t.max() < 1000 + 1e-3
    assert t.mean() == pytest.approx(500, abs=25)


def test_shift_is_the_schedulers(generator):
    """Training draws the timesteps that the shifted scheduler steps through."""
    process = process_for("flow", shift=3.0)
    u = draw_timesteps(process, (500,), torch.Generator().manual_seed(1)) / 1000
    shifted = draw_timesteps(process, (500,), torch.Generator().manual_seed(1), shift=3.0) / 1000
    torch.testing.assert_close(shifted, 3 * u / (1 + 2 * u))
    process.scheduler.set_timesteps(10)
    plain = process_for("flow").scheduler
    plain.set_timesteps(10)
    # diffusers shifts the last timestep twice: there it is 0.009 where the formula has 0.003.
    torch.testing.assert_close(process.scheduler.sigmas, 3 * plain.sigmas / (1 + 2 * plain.sigmas), rtol=0, atol=7e-3)


# ---- Checkpoints ----


def saved(tmp_path, **given):
    trainer = Trainer(recipe(**given), SCENES)
    trainer.step()
    return trainer, trainer.save(tmp_path / "c.safetensors")


@pytest.mark.parametrize("where", ("fsync", "replace", "write"))
def test_an_interrupted_save_leaves_the_old_file(where, tmp_path, monkeypatch):
    trainer, path = saved(tmp_path)
    before = path.read_bytes()
    trainer.step()

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "replace":
        monkeypatch.setattr("pathlib.Path.replace", fail)
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr("safetensors.torch.save", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_wrong_checkpoints(tmp_path):
    trainer, path = saved(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none.safetensors: no such file"):
        trainer.restore(tmp_path / "none.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("not a checkpoint")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    for broken in (text, cut):
        with pytest.raises(CheckpointError, match=r"not a whole safetensors file"):
            load_trained(broken)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not written by vdcore train"):
        load_trained(tmp_path / "other.safetensors")
    checkpoint.save(tmp_path / "empty.safetensors", {}, {"step": 0})
    with pytest.raises(CheckpointError, match="not of a VDiT of this version"):
        load_trained(tmp_path / "empty.safetensors")
    other = Trainer(recipe(lr=1e-4, batch=2), SCENES)
    with pytest.raises(CheckpointError, match=r"another recipe: batch 3, now 2; lr 0.003, now 0.0001"):
        other.restore(path)
    elsewhere = Trainer(recipe(), Scenes(MovingShapes(frames=4, size=(8, 8), objects=2)))
    with pytest.raises(CheckpointError, match=r"another source: objects 1, now 2; occluders 0, now 1"):
        elsewhere.restore(path)


def test_recipes_survive_json():
    made = recipe(target="epsilon")
    assert Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    "given,message",
    (
        ({"size": (8, 10)}, "Recipe: width must be a multiple of the patch size 4, got 10"),
        ({"steps": 0}, "Recipe: steps must be at least 1, got 0"),
        ({"hold": 1.5}, "Recipe: hold must be from 0 to 1, got 1.5"),
        ({"target": "noise"}, "Recipe: target must be one of sample, flow, v_prediction, epsilon, got 'noise'"),
    ),
)
def test_recipe_errors(given, message):
    with pytest.raises(ValueError, match=message):
        recipe(**given)


def test_tokens_of_several_frames_are_held_and_noised_whole(monkeypatch):
    """Frames of one token have one timestep, and are held together."""
    seen = []
    given = recipe(model=replace(MODEL, patch=(2, 4, 4)), frames=8, batch=64, hold=0.5, forcing=0.5)
    trainer = Trainer(given, Scenes(replace(SCENES.shapes, frames=8)))
    loss = trainer.process.loss

    def spy(denoise, clean, noise, timestep, held):
        seen.append((timestep, held))
        return loss(denoise, clean, noise, timestep, held)

    monkeypatch.setattr(trainer.process, "loss", spy)
    trainer.step()
    (timestep, held), *_ = seen
    assert torch.equal(timestep[:, ::2], timestep[:, 1::2]) and timestep[:, ::2].diff(dim=1).any()
    assert torch.equal(held[:, ::2], held[:, 1::2]) and held.any() and not held.all(1).any()
