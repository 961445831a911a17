"""The synthetic set: the same for everybody, and its truth is the truth of its pixels."""

import math

import numpy as np
import pytest
import torch

from vdcore.metrics import warp
from vdcore.video import Background, Layers, MovingShapes, Scene

KINDS = (
    MovingShapes(frames=8),
    MovingShapes(frames=6, size=(24, 40), spin=0.15, pan=0.7, bounce=True),
    MovingShapes(frames=8, size=(16, 16), radius=(2, 3), speed=(1, 3), objects=3, occluders=2, bounce=True),
)


def one_shape(center, half, corner=0.0, size=(16, 16), angle=None, pan=None) -> Scene:
    """A white shape without texture on black; center is (T, 2)."""
    T = len(center)
    color = np.ones((1, 1, 2, 3))
    layers = Layers(
        np.array(center, float).reshape(1, 1, T, 2),
        np.array(half, float).reshape(1, 1, 2),
        np.full((1, 1), corner),
        color,
        np.zeros((1, 1, 2)),
        np.zeros((1, 1, 2)),
        None if angle is None else np.array(angle, float).reshape(1, 1, T),
    )
    offset = None if pan is None else np.array(pan, float).reshape(1, T, 2)
    return Scene(Background(np.zeros((1, 2, 3)), np.zeros((1, 1, 2)), np.zeros((1, 1)), offset), layers, size)


@pytest.mark.parametrize("shapes", KINDS)
def test_a_clip_depends_on_seed_and_index_alone(shapes):
    a, b = shapes.batch([5, 2**40, 7, 0]), shapes.batch(torch.tensor([0, 5]))
    assert torch.equal(a.video[[3, 0]], b.video) and torch.equal(a.flow[[3, 0]], b.flow)
    assert not torch.equal(a.video[0], a.video[2])
    other = MovingShapes(**{**vars(shapes), "seed": 1}).batch([5])
    assert not torch.equal(other.video[0], a.video[0])


def test_random_clips_follow_the_generator():
    shapes = MovingShapes(frames=3)
    a, b, c = (shapes.batch(4, torch.Generator().manual_seed(seed)).video for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("shapes", KINDS)
def test_shapes_and_ranges(shapes):
    scene = shapes.batch(range(5))
    (H, W), T = shapes.size, shapes.frames
    assert scene.video.shape == (5, 3, T, H, W) and scene.video.dtype == torch.float32
    assert scene.video.min() >= 0 and scene.video.max() <= 1
    assert scene.flow.shape == scene.flow_back.shape == (5, T - 1, 2, H, W)
    assert scene.occluded.shape == scene.disoccluded.shape == (5, T - 1, H, W)
    assert scene.top.shape == (5, T, H, W) and scene.top.max() <= shapes.objects + shapes.occluders


def test_a_box_covers_exactly_its_share_of_every_pixel():
    scene = one_shape([(5.25, 8.0)], (2.0, 3.0))
    row = scene.video[0, 0, 0, 8]
    expected = torch.zeros(16)
    expected[4:7] = 1  # from 3.25 to 7.25, where pixel j is from j - 1/2 to j + 1/2
    expected[3], expected[7] = 0.25, 0.75
    torch.testing.assert_close(row, expected)
    assert scene.video[0, 0, 0].sum().item() == pytest.approx(24, abs=0.5)  # corners are rounded a little


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 4])
def test_area_does_not_depend_on_place_or_angle(angle):
    areas = [
        one_shape([(7.5 + dx, 7.5)], (4.0, 3.0), corner, angle=[angle]).video[0, 0].sum().item()
        for dx in (0.0, 0.2, 0.37)
        for corner in (0.0, 1.5)
    ]
    for area, corner in zip(areas, (0.0, 1.5) * 3):
        assert area == pytest.approx(48 - (4 - math.pi) * corner**2, rel=0.02)


def test_constant_velocity_below_a_pixel_is_the_flow():
    scene = one_shape([(6 + 0.3 * t, 9 - 0.7 * t) for t in range(5)], (3, 2), 2)
    inside = scene.top[:, :-1] == 1
    flow = scene.flow.movedim(2, -1)
    torch.testing.assert_close(flow[inside], torch.tensor((0.3, -0.7)).expand(int(inside.sum()), 2))
    assert (flow[~inside] == 0).all()
    torch.testing.assert_close(scene.flow_back.movedim(2, -1)[scene.top[:, 1:] == 1].mean(0), torch.tensor((-0.3, 0.7)))


def test_rotation_moves_points_around_the_centre():
    scene = one_shape([(8, 8), (9, 8)], (5, 5), angle=[0.2, 0.2 + math.pi / 2])
    # A quarter turn from x towards y, and a step to the right: (11, 8) is 3 to the right of the centre, then 3 below.
    torch.testing.assert_close(scene.flow[0, 0, :, 8, 11], torch.tensor((9 - 11, 11 - 8)).float(), atol=1e-5, rtol=0)


def test_the_background_moves_with_its_offset():
    scene = one_shape([(2, 2), (2, 2)], (1, 1), pan=[(0, 0), (0.5, -0.25)])
    assert scene.flow[0, 0, :, 12, 12].tolist() == [0.5, -0.25]
    assert scene.flow[0, 0, :, 2, 2].tolist() == [0, 0]


def test_what_goes_behind_and_comes_out_is_marked():
    centers = np.zeros((1, 2, 3, 2))
    centers[0, 0] = [(3, 5), (6, 5), (9, 5)]  # a box 3 pixels wide goes behind a wall from 7.5 to 12.5, and stays there
    centers[0, 1] = (10, 5)
    half = np.array([[[1.5, 1.5], [2.5, 20]]])
    layers = Layers(centers, half, np.zeros((1, 2)), np.ones((1, 2, 2, 3)), np.zeros((1, 2, 2)), np.zeros((1, 2, 2)))
    scene = Scene(Background(np.zeros((1, 2, 3)), np.zeros((1, 1, 2)), np.zeros((1, 1))), layers, (11, 16))
    expected = torch.zeros(11, 16, dtype=torch.bool)
    expected[4:7, 5:8] = True  # the background that the box covers next; the box itself stays in sight
    assert torch.equal(scene.occluded[0, 0], expected)
    expected = torch.zeros(11, 16, dtype=torch.bool)
    expected[4:7, 5:8] = True  # in the second step all of the box goes behind the wall
    assert torch.equal(scene.occluded[0, 1], expected)
    assert scene.disoccluded[0, 0, 5].nonzero().flatten().tolist() == [2, 3, 4]  # where the box was
    assert scene.visible_share(1)[0].tolist() == [1, 1, 0]


@pytest.mark.parametrize("shapes", KINDS)
def test_flow_and_occlusion_explain_the_next_frame(shapes):
    """Every point that stays in sight is found, in its colors, where its flow leads."""
    scene = shapes.batch(range(16))
    frames = scene.video.transpose(1, 2)
    error = (frames[:, :-1] - warp(frames[:, 1:], scene.flow)).square().mean(2)
    still = (frames[:, :-1] - frames[:, 1:]).square().mean(2)
    kept = ~scene.occluded
    # At edges a pixel shows two surfaces; inside of them interpolation is all that errs.
    top = scene.top.float()
    one_surface = -torch.nn.functional.max_pool2d(-top, 3, 1, 1) == torch.nn.functional.max_pool2d(top, 3, 1, 1)
    inner = kept & one_surface[:, :-1]
    moving = inner & (scene.flow.norm(dim=2) > 0.2)
    assert moving.sum() > 100
    assert error[moving].mean() < 0.15 * still[moving].mean()
    assert error[kept].mean() < error[scene.occluded].mean() / 3


def test_bouncing_objects_stay_in_the_picture():
    scene = MovingShapes(frames=60, speed=(2, 4), bounce=True, occluders=0).batch(range(8))
    center, half = scene.layers.center, scene.layers.half[:, :, None]
    assert (center - half >= -1e-4).all() and (center + half <= 31 + 1e-4).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"size": (0, 8)}, r"size must be two positive numbers \(H, W\), got \(0, 8\)"),
        ({"radius": (3, 2)}, "radius must be a range"),
        ({"speed": (-1, 2)}, "speed must be a range"),
        ({"spin": -0.1}, "spin must be at least 0"),
    ],
)
def test_bad_scenes(wrong, message):
    with pytest.raises(ValueError, match=f"MovingShapes: {message}"):
        MovingShapes(**wrong)


def test_bad_indices():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        MovingShapes().batch(-1)
    with pytest.raises(ValueError, match="indices must be a list"):
        MovingShapes().batch([[1, 2]])
    with pytest.raises(ValueError, match="layer must be 1 to 3, got 4"):
        MovingShapes().batch(1).visible_share(4)


def test_hues_stay_in_their_range():
    """Red objects on blue: where a pixel changes, red wins over blue or loses to it."""
    shapes = MovingShapes(frames=2, objects=1, occluders=0, object_hue=(0.0, 0.05), background_hue=(0.6, 0.65))
    scene = shapes.batch(range(40))
    red, _, blue = scene.video.unbind(1)
    inside = scene.top == 1
    assert 0.02 < inside.float().mean() < 0.3
    assert (red > blue)[inside].float().mean() > 0.95 and (red < blue)[~inside].float().mean() > 0.95
    with pytest.raises(ValueError, match="MovingShapes: background_hue must be a range of at most one turn"):
        MovingShapes(background_hue=(0.5, 0.2))
