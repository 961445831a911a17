"""Depth control: nothing at first, everything it needs afterwards."""

import pytest
import torch
from vdits import SIZE, config, inputs, model_of

from vdcore import FrameMask
from vdcore.models import DepthControl

DEPTH = torch.rand(SIZE[0], 1, *SIZE[2:])


@pytest.mark.parametrize("attention", ("factorized", "alternating", "gated", "full"))
def test_identity_at_first_and_only_the_control_learns(attention):
    model = model_of(config(attention=attention, modulation="single")).requires_grad_(False)
    control, (video, timestep, keywords) = DepthControl(model), inputs()
    expected = model(video, timestep, **keywords)
    out = model(video, timestep, control=control(video, timestep, DEPTH, **keywords), **keywords)
    assert torch.equal(out, expected)

    control.requires_grad_(True)
    optimizer = torch.optim.SGD(control.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        given = control(video, timestep, DEPTH, **keywords)
        loss = (model(video, timestep, control=given, **keywords) - DEPTH).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [name for name, p in control.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert torch.equal(model(video, timestep, **keywords), expected)
    a, b = (control(video, timestep, depth, **keywords)[0] for depth in (DEPTH, 1 - DEPTH))
    assert not torch.equal(a, b)  # depth is seen


def test_the_copy_is_a_copy():
    model = model_of(config(depth=3))
    control = DepthControl(model, blocks=2)
    assert len(control.copy.blocks) == len(control.outputs) == 2
    weight = model.blocks[1].layers["mlp"].up.weight
    assert torch.equal(control.copy.blocks[1].layers["mlp"].up.weight, weight)
    weight.data.zero_()
    assert control.copy.blocks[1].layers["mlp"].up.weight.any()


@torch.no_grad()
def test_a_controlled_stream():
    model = model_of(config(mask=FrameMask(past=1, future=0, chunk=2)))
    control, (video, timestep, keywords) = DepthControl(model), inputs(per_frame=True)
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    whole = model(video, timestep, control=control(video, timestep, DEPTH, **keywords), **keywords)
    caches = [m.new_cache(SIZE[0], *SIZE[3:]) for m in (model, control)]
    chunks = []
    for own in (slice(0, 2), slice(2, 4)):
        now, t = video[:, :, own], timestep[:, own]
        given = control(now, t, DEPTH[:, :, own], cache=caches[1], keep=True, **keywords)
        chunks.append(model(now, t, control=given, cache=caches[0], keep=True, **keywords))
    torch.testing.assert_close(torch.cat(chunks, 2), whole, rtol=1e-4, atol=1e-4)


def test_errors():
    model, (video, timestep, keywords) = model_of(config()), inputs()
    with pytest.raises(ValueError, match="blocks must be 1 to 2, the model's depth, got 3"):
        DepthControl(model, blocks=3)
    with pytest.raises(ValueError, match=r"depth must be \(B, channels, T, H, W\) = \(2, 1, 4, 6, 8\), got"):
        DepthControl(model)(video, timestep, DEPTH[:, :, :3], **keywords)
