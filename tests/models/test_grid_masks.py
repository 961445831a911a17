"""Windows in rows and columns in a VDiT: equal to the dense mask, in training too, and what has no such windows."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vdcore import FrameMask, GridMask
from vdcore.models import VDiT, VDiTConfig
from vdcore.models import attention as layers

GRID = (3, 4, 5)
MASKS = {
    "window": GridMask.window(1, 0, 1, 2),
    "radial": GridMask.radial(4, 5, frames=8),
    "tiles": GridMask.tiles((1, 1, 3), (2, 3, 2)),
    "heads": ((2, GridMask.neighborhood((3, 3, 3))), (2, FrameMask.causal())),
}


def config(mask, **given):
    return VDiTConfig(
        in_channels=2, width=32, depth=2, heads=4, attention="full", position="rope", qk_norm=True, mask=mask, **given
    )


def model_of(given):
    torch.manual_seed(0)
    model = VDiT(given)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 2, GRID[0], 2 * GRID[1], 2 * GRID[2]), torch.tensor([100.0, 700.0])


def dense(mask):
    if isinstance(mask, tuple):
        return torch.cat([dense(one).expand(count, -1, -1) for count, one in mask])
    if isinstance(mask, GridMask):
        return mask.visible(*GRID)
    n = GRID[1] * GRID[2]
    return mask.visible(GRID[0]).repeat_interleave(n, 0).repeat_interleave(n, 1)


def by_torch(q, *, mask, norm, rope, grid=None):
    """The operator on a packed projection, by SDPA under the dense mask."""
    like, (q, k, v) = q, q.unbind(3)
    q, k = layers.qk_norm_rope(q, k, norm=norm, rope=rope)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense(mask))
    return out.transpose(1, 2).unflatten(1, like.shape[1:3])


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_equals_the_dense_one(name, monkeypatch):
    model, (video, timestep) = model_of(config(MASKS[name])), inputs()

    def result():
        out = model(video, timestep)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        return out, torch.autograd.grad(out, list(model.parameters()), dout, allow_unused=True)

    ours, gradients = result()
    plain = model_of(config(FrameMask.full()))(video, timestep)
    assert not torch.allclose(ours, plain, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(layers, "video_attention", by_torch)
    theirs, expected = result()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()) + 1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_configs_are_read_as_they_were_written(name):
    given = config(MASKS[name])
    assert VDiTConfig.from_json(given.to_json()) == given
    assert "row_steps" not in json.loads(given.to_json())["mask"]


def test_a_model_learns_under_a_window():
    """Twenty steps on one clip: the loss falls, and a copy from the config goes on from the same weights."""
    model, (video, timestep) = model_of(config(MASKS["tiles"], checkpoint=True)).train(), inputs()
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(20):
        loss = F.mse_loss(model(video, timestep), video)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    again = VDiT(VDiTConfig.from_json(model.config.to_json()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(video, timestep), model(video, timestep))


def test_sizes_share_no_mask():
    """Grids of as many tokens, by turns: each as in a model of its own."""
    model = model_of(config(MASKS["window"])).eval()
    clips = [torch.randn(1, 2, 3, *size) for size in ((8, 12), (12, 8), (4, 24), (8, 12))]
    with torch.no_grad():
        want = [model_of(config(MASKS["window"])).eval()(clip, torch.tensor([5.0])) for clip in clips]
        for i in (0, 1, 2, 3, 1, 0):
            assert torch.equal(model(clips[i], torch.tensor([5.0])), want[i])


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"mask": "causal"}, TypeError, r"mask must be a FrameMask, a GridMask, or pairs .*, got str"),
        ({"mask": ((4, "causal"),)}, TypeError, r"mask must be a FrameMask, a GridMask, or pairs"),
        ({"mask": ((3, FrameMask()),)}, ValueError, r"mask must be of multiples of 1 heads, 4 in all, got \[3\]"),
        ({"mask": ((1, FrameMask()), (3, FrameMask())), "kv_heads": 2}, ValueError, r"multiples of 2 heads, 4 in all"),
        ({"mask": MASKS["window"], "attention": "factorized"}, ValueError, r"one FrameMask with factorized attention"),
    ],
)
def test_what_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        replace(config(FrameMask()), **given)


def test_a_cache_is_of_whole_frames():
    with pytest.raises(ValueError, match="mask must be one FrameMask here, got GridMask"):
        model_of(config(MASKS["window"])).new_cache(1, 8, 8)
