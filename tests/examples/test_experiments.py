"""The worlds of the experiments are what their texts say, and each runs from end to end, small."""

import math
from dataclasses import replace

import pytest
import torch

from experiments import flicker, horizon, motion_paths
from experiments.figure import Figure


@pytest.mark.parametrize("hidden", [1, 4, horizon.LONGEST])
def test_the_object_is_out_of_sight_for_n_frames(hidden):
    scene = horizon.make_clips(torch.tensor([hidden]), torch.tensor([5]), [3])
    share = scene.visible_share(1)[0]
    T = horizon.FRAMES
    assert (share[: T - hidden] == 1).all() and share[T] == 1
    assert (share[T - hidden : T] == 0).all()
    alone = horizon.make_clips(torch.tensor([hidden]), torch.tensor([5]), [3], last=True)
    assert torch.equal(alone.video[:, :, 0], scene.video[:, :, -1])


def test_nothing_but_the_object_tells_its_identity():
    n, kinds = torch.full((horizon.KINDS,), 4), torch.arange(horizon.KINDS)
    video = horizon.make_clips(n, kinds, [9] * horizon.KINDS).video
    out_of_sight = video[:, :, horizon.FRAMES - 4 : horizon.FRAMES]
    assert (out_of_sight == out_of_sight[:1]).all()
    returned = video[:, :, -1].flatten(1)
    assert (torch.cdist(returned, returned) + 10 * torch.eye(horizon.KINDS) > 0.5).all()


def test_a_perfect_and_an_ignorant_prediction(monkeypatch):
    clips = horizon.EvalSet.of(3, 3 * horizon.KINDS)
    truth = clips.candidates[clips.identity, torch.arange(len(clips.identity))]
    monkeypatch.setattr(horizon, "predict", lambda net, given: truth[:, :, None])
    assert clips.success(None) == 1
    monkeypatch.setattr(horizon, "predict", lambda net, given: given)
    assert clips.success(None) == pytest.approx(horizon.CHANCE, abs=0.1)


@pytest.mark.parametrize("speed", motion_paths.SPEEDS)
def test_the_square_is_at_x_plus_v_dt(speed):
    scene, token = motion_paths.make_clips(torch.tensor([speed, -speed]), [1, 2])
    P, W = motion_paths.PATCH, motion_paths.SIZE[1]
    for b, velocity in enumerate((speed, -speed)):
        row, column = divmod(token[b].item(), W // P)
        seen = scene.top[b] == 1
        assert seen[motion_paths.MIDDLE, P * row : P * row + P, P * column : P * column + P].all()
        for t in range(motion_paths.FRAMES):
            columns = seen[t].nonzero()[:, 1].float()
            expected = P * column + (P - 1) / 2 + velocity * (t - motion_paths.MIDDLE)
            assert columns.mean().item() == pytest.approx(expected, abs=0.51) and len(columns) >= 12


def test_at_one_position_the_middle_stays_for_patch_over_2v():
    for speed in motion_paths.SPEEDS:
        steps = motion_paths.limit(speed)
        assert speed * math.floor(steps) <= motion_paths.PATCH / 2 < speed * (math.floor(steps) + 1)


def test_where_a_net_looks_is_measured_on_the_line():
    torch.manual_seed(0)
    found = motion_paths.look(motion_paths.new_net("full", 16), 2.0, 6)
    assert found.map.shape == (motion_paths.FRAMES, motion_paths.SIZE[1] // motion_paths.PATCH)
    assert found.frame.sum().item() == pytest.approx(1, abs=1e-4)
    # 2 pixels a frame, patches of 4: after 4 frames 2 patches to the right, 4 frames before 2 to the left.
    center = motion_paths.SIZE[1] // motion_paths.PATCH // 2
    assert found.line[-1] == found.map[-1, center + 2] and found.line[0] == found.map[0, center - 2]
    assert torch.equal(found.same, found.map[:, center])
    temporal = motion_paths.look(motion_paths.new_net("temporal", 16), 2.0, 6)
    torch.testing.assert_close(temporal.same, temporal.frame)


def small(experiment):
    if experiment is motion_paths:
        return lambda out: motion_paths.run(out, motion_paths.TrainConfig(steps=2, batch=2, width=16, clips=6))
    if experiment is horizon:
        config = horizon.TrainConfig(steps=2, more_steps=1, batch=2, clips=12, width=16)
        return lambda out: horizon.run(out, config, nets=((1, 2), (2, 3)))
    return lambda out: flicker.run(out, flicker.TrainConfig(steps=1, batch=2, width=32, clips=6, sampling_steps=2))


@pytest.mark.parametrize(
    "experiment",
    [motion_paths, horizon, pytest.param(flicker, marks=pytest.mark.slow)],
    ids=lambda module: module.NAME,
)
def test_each_runs_and_leaves_its_figure(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(flicker, "real_windows", lambda *args: (_ for _ in ()).throw(FileNotFoundError))
    figure = small(experiment)(tmp_path)
    assert figure.name == experiment.NAME and not figure.passed  # two steps teach nothing
    assert Figure.load(tmp_path / f"{figure.name}.json").claim == figure.claim
    assert {f"{figure.name}.png", f"{figure.name}.md"} <= set(figure.files)
    assert all((tmp_path / name).stat().st_size > 100 for name in figure.files)
    if experiment is horizon:
        assert figure.numbers["largest_derivative_beyond_reach"] == 0
        assert set(figure.numbers["rounds"].values()) == {horizon.TrainConfig().rounds}  # it has not learned


def test_both_models_of_flicker_have_about_as_many_weights():
    config = flicker.TrainConfig()
    on, off = (flicker.Trainer(flicker.recipe(kind, config), flicker.Scenes(flicker.SCENES)) for kind in ("on", "off"))
    weights = [sum(p.numel() for p in trainer.model.parameters()) for trainer in (on, off)]
    assert weights[0] == pytest.approx(weights[1], rel=0.06)
    ours, theirs = on.recipe, off.recipe
    same = replace(theirs, model=replace(theirs.model, attention=ours.model.attention, depth=ours.model.depth))
    assert same == ours
