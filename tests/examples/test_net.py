"""The experiments' net: its weights are those that the operators use, and its reach is what the mask says."""

import pytest
import torch

from experiments.net import KINDS, Attention, VideoNet
from vdcore.mask import FrameMask

MASKS = (FrameMask.full(), FrameMask.window(2), FrameMask(past=1, future=1, sink=1))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_weights_give_the_operators_result(kind, mask):
    torch.manual_seed(0)
    layer, x = Attention(32, 4, kind, mask), torch.randn(3, 5, 6, 32)
    qkv = layer.project(x)
    out, lse = layer.attend(qkv)
    assert lse.shape == (3, 5, 6, 4)
    token = torch.tensor((0, 5, 2))
    for frame in (0, 3):
        weights = layer.weights(x, frame, token)
        assert weights.shape == (3, 4, 5, 6)
        torch.testing.assert_close(weights.sum((2, 3)), torch.ones(3, 4))
        expected = torch.einsum("bhts,btshd->bhd", weights, qkv[:, :, :, 2])
        torch.testing.assert_close(out[torch.arange(3), frame, token], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("layers", "window"), [(1, 2), (2, 1), (2, 3), (3, 1)])
def test_reach_is_layers_times_window(layers, window):
    torch.manual_seed(0)
    net = VideoNet(
        (8, 8, 8), (4, 4), width=16, blocks=layers, layers=("spatial", "temporal"), mask=FrameMask.window(window)
    )
    torch.nn.init.normal_(net.back)
    video = torch.randn(1, 3, 8, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(video)[:, :, -1].square().sum(), video)
    seen = gradient.abs().amax((0, 1, 3, 4))
    reach = layers * window
    assert (seen[: 7 - reach] == 0).all() and (seen[7 - reach :] > 0).all()


def test_an_untrained_net_predicts_nothing():
    net = VideoNet((4, 8, 12), (4, 4), width=16, blocks=1, layers=("full",))
    video = torch.randn(2, 3, 4, 8, 12)
    assert net(video).shape == video.shape and (net(video) == 0).all()


def test_unknown_layers():
    with pytest.raises(ValueError, match="kind must be one of spatial, temporal, full, got 'global'"):
        Attention(16, 2, "global", FrameMask())
