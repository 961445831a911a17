"""Which frames flicker, where, and how much of it is attention across frames' doing."""

import json

import pytest
import torch
from typer.testing import CliRunner

from vdcore import FrameMask
from vdcore.cli.commands import app
from vdcore.diffusion.data import Scenes
from vdcore.diffusion.temporal_share import across_frames
from vdcore.diffusion.training import Recipe, Trainer
from vdcore.metrics import frame_flicker
from vdcore.models import VDiT, VDiTConfig
from vdcore.video import MovingShapes, write_video


def scene(frames=9):
    shapes = MovingShapes(frames=frames, size=(64, 64), radius=(9, 14), speed=(1, 1), occluders=0, pan=0.5)
    return shapes.batch([5]).video * 0.6 + 0.2


def test_a_frame_that_is_brighter_stands_out():
    video = scene()
    video[:, :, 4:] += 0.05
    (found,) = frame_flicker(video)
    assert found.odd == (4,)
    assert found.change[3] == pytest.approx(0.05 * 255, rel=0.1)
    assert found.brightness[3] == pytest.approx(0.05 * 255, rel=0.1)


def test_a_corner_that_changes_is_found():
    video = scene()
    video[:, :, 6, 48:, :16] = 1 - video[:, :, 6, 48:, :16]
    (found,) = frame_flicker(video)
    assert set(found.odd) <= {6, 7} and found.odd
    assert found.place(found.odd[0])[:2] == (3, 0) and found.place(found.odd[0])[2] > 0.6


def test_motion_alone_is_no_flicker():
    (found,) = frame_flicker(scene())
    assert found.odd == () and found.change.max() < 4
    (still,) = frame_flicker(scene(1).expand(-1, -1, 5, -1, -1))
    assert still.odd == () and still.change.max() == 0


def model(attention):
    torch.manual_seed(0)
    given = VDiTConfig(in_channels=2, patch=(1, 2, 2), width=24, depth=2, heads=2, attention=attention, position="rope")
    made = VDiT(given).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return made


@pytest.mark.parametrize("attention", ["factorized", "full", "gated"])
@torch.no_grad()
def test_the_weight_of_attention_across_frames(attention):
    """0 is a model that sees frames alone, 1 the model itself, and what is between is a line from layer to layer."""
    made, video = model(attention), torch.randn(1, 2, 4, 4, 6)
    whole = made(video, torch.zeros(1))
    with across_frames(made, weight=1.0):
        assert torch.equal(made(video, torch.zeros(1)), whole)
    with across_frames(made, weight=0.0):
        apart = made(video, torch.zeros(1))
        changed = video.clone()
        changed[:, :, 2:] += 1
        assert torch.equal(made(changed, torch.zeros(1))[:, :, :2], apart[:, :, :2])
    assert not torch.allclose(apart, whole, atol=1e-3)
    with across_frames(made, mask=FrameMask.same_frame()):
        torch.testing.assert_close(made(video, torch.zeros(1)), apart)
    assert torch.equal(made(video, torch.zeros(1)), whole), "all is as it was"


def test_a_model_without_attention_across_frames():
    with pytest.raises(ValueError, match="model must have attention across frames"), across_frames(model("spatial")):
        pass


def test_the_command_on_a_video(tmp_path):
    video = scene()
    video[:, :, 4:] += 0.08
    path = write_video(tmp_path / "clip.mp4", video[0])
    result = CliRunner().invoke(app, ["flicker", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "frame 4: " in result.output and "the whole picture, brighter" in result.output
    numbers = json.loads((tmp_path / "out" / "flicker.json").read_text())
    assert numbers["odd_frames"] == [4] and numbers["worst"][0]["frame"] == 4 and len(numbers["change"]) == 8
    assert (tmp_path / "out" / "flicker.png").stat().st_size > 10_000


def test_the_command_on_a_model(tmp_path):
    config = VDiTConfig(in_channels=3, patch=(1, 4, 4), width=16, depth=1, heads=2, position="rope", attention="full")
    shapes = MovingShapes(frames=4, size=(16, 16), objects=1, occluders=0, radius=(2.0, 3.0))
    trainer = Trainer(Recipe(model=config, frames=4, size=(16, 16), batch=2, steps=2), Scenes(shapes))
    trainer.step()
    path = trainer.save(tmp_path / "checkpoint.safetensors")
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["flicker", str(path), "--out", str(out), "--count", "3", "--steps", "2"])
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "flicker.json").read_text())
    assert {"real clips", "weight 0", "weight 1", "weight 1.5", "window of 3 tokens"} <= set(rows)
    assert "spliced, 1 frames of overlap" in rows and all(row["change"] >= 0 for row in rows.values())
    assert "attention across frames takes away" in result.output


def test_what_does_not_flicker(tmp_path):
    path = write_video(tmp_path / "one.mp4", torch.rand(3, 1, 16, 16))
    result = CliRunner().invoke(app, ["flicker", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "one frame does not flicker" in result.output
