"""The differentiable flow on known motion, its gradient against differences, and the loss that is made of it."""

import pytest
import torch
from torch.autograd import gradcheck

from vdcore.metrics import flow_change, lucas_kanade, temporal_loss
from vdcore.video import MovingShapes


def pan(velocities, size=24):
    """A texture that moves by the given velocity in every step: (1, 3, T, H, W)."""
    y, x = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    at, frames = torch.zeros(2), []
    for velocity in [(0.0, 0.0), *velocities]:
        at = at + torch.tensor(velocity)
        u, v = x - at[0], y - at[1]
        frames.append(0.5 + 0.2 * (0.7 * u + 0.3 * v).sin() + 0.2 * (0.8 * v - 0.2 * u).cos())
    return torch.stack(frames).expand(1, 3, -1, -1, -1)


@pytest.mark.parametrize("velocity", [(0.0, 0.0), (0.4, -0.3), (1.5, 1.0), (-2.5, 2.0)])
def test_flow_of_a_moving_texture(velocity):
    video = pan([velocity])
    flow = lucas_kanade(video[:, :, 0], video[:, :, 1])
    assert flow.shape == (1, 2, 24, 24)
    found = flow[0, :, 5:-5, 5:-5]
    torch.testing.assert_close(found.mean((1, 2)), torch.tensor(velocity), atol=0.08, rtol=0)
    assert found.std(dim=(1, 2)).max() < 0.15


def test_flow_of_moving_shapes():
    scene = MovingShapes(frames=6, size=(40, 40), radius=(6, 9), speed=(0.5, 1.5), pan=0.7).batch(range(8))
    frames = scene.video.transpose(1, 2)
    flow = lucas_kanade(frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)).unflatten(0, (8, -1))
    error = (flow - scene.flow).norm(dim=2)[~scene.occluded].mean()
    assert error < 0.5 * scene.flow.norm(dim=2).mean()


def test_nothing_to_see_is_no_motion():
    blank = torch.full((2, 3, 16, 16), 0.3)
    assert lucas_kanade(blank, blank).abs().max() == 0
    assert lucas_kanade(blank, blank + 0.1).abs().max() < 1e-4


def test_gradient_against_differences():
    a, b = (pan([(0.3, 0.2)], 9)[:, :1, t].double() + 0.05 * torch.rand(1, 1, 9, 9).double() for t in (0, 1))
    a, b = a.requires_grad_(), b.requires_grad_()
    assert gradcheck(lambda a, b: lucas_kanade(a, b, levels=2, iterations=2), (a, b), fast_mode=True, atol=1e-6)


def test_gradient_over_levels():
    a, b = (x.double().requires_grad_() for x in pan([(1.2, -0.6)], 16)[:, :1].unbind(2))
    assert gradcheck(lambda a, b: lucas_kanade(a, b, levels=2, iterations=2), (a, b), fast_mode=True, atol=1e-6)


def test_gradient_of_the_loss():
    video = pan([(0.5, 0.0), (0.2, 0.4)], 8)[:, :1].double().requires_grad_()
    noise = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda n, v: temporal_loss(n, v, 0.3), (noise, video), fast_mode=True, atol=1e-6)


def test_even_motion_costs_nothing_and_jerks_cost_their_square():
    even, jerk = pan([(0.6, -0.2)] * 3), pan([(0.6, -0.2), (-0.4, -0.2), (0.6, -0.2)])
    assert flow_change(even) < 0.03
    assert flow_change(jerk).item() == pytest.approx(1.0, rel=0.2)  # the velocity changes by 1 pixel a frame each time
    still = even[:, :, :1].expand_as(even)
    assert flow_change(still) == 0


def test_the_loss_is_the_sum():
    video = pan([(0.5, 0), (0, 0.5)])
    noise = torch.tensor(2.0)
    assert temporal_loss(noise, video, 0.0) == 2
    torch.testing.assert_close(temporal_loss(noise, video, 0.25), 2 + 0.25 * flow_change(video))

    def constant(a, b):
        return (b - a).mean((1, 2, 3))[:, None, None, None].expand(-1, 2, 4, 4)

    steps = torch.tensor((0.0, 0.1, 0.4)).view(1, 1, 3, 1, 1).expand(1, 3, 3, 4, 4)  # flows 0.1 and 0.3 on both axes
    assert temporal_loss(noise, steps, 1.0, flow=constant).item() == pytest.approx(2 + 2 * 0.2**2)


def test_descent_makes_motion_even():
    """The gradient points to where it should: a jerk in the middle is smoothed away."""
    video = pan([(0.6, 0.0), (0.0, 0.0), (0.6, 0.0)]).clone().requires_grad_()
    before = flow_change(video).item()
    optimizer = torch.optim.Adam([video], lr=0.01)
    for _ in range(15):
        optimizer.zero_grad()
        flow_change(video).backward()
        optimizer.step()
    assert flow_change(video).item() < 0.3 * before


def test_bad_input():
    a = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"a and b must be \(N, C, H, W\), equal"):
        lucas_kanade(a, a[:, :1])
    with pytest.raises(ValueError, match="sigma, ridge and step positive"):
        lucas_kanade(a, a, ridge=0)
    with pytest.raises(ValueError, match="T at least 3"):
        flow_change(torch.rand(1, 3, 2, 8, 8))
