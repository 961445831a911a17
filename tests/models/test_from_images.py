"""Weights of other models: Latte's, and those of an image model."""

import pytest
import torch
from vdits import MASKS, config, inputs, model_of

from vdcore.models import from_latte, inflate
from vdcore.models.config import MODULATION
from vdcore.testing import error_ratio

diffusers = pytest.importorskip("diffusers")


def latte(**given):
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 32,
        "attention_bias": True,
        "sample_size": 16,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": 24,
        "video_length": 5,
    }
    model = diffusers.LatteTransformer3DModel(**{**sizes, **given}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("given", ({}, {"attention_bias": False}, {"sample_size": 128}), ids=str)
@pytest.mark.parametrize("size", ((16, 16), (12, 20)), ids=str)
@torch.no_grad()
def test_latte(given, size):
    host = latte(**given)
    model = from_latte(host)
    video, timestep, text = torch.randn(2, 4, 5, *size), torch.tensor([3, 700]), torch.randn(2, 7, 24)
    theirs = host(video, timestep, text).sample
    ours = model(video, timestep, text=text)
    exact = host.double()(video.double(), timestep, text.double()).sample
    assert ours.shape == theirs.shape == (2, 8, 5, *size)
    assert error_ratio(ours, exact, [theirs]).worst <= 1


@torch.no_grad()
def test_latte_with_padded_text():
    """Lengths are what the host's mask says, once for every frame."""
    host = latte()
    video, timestep, text = torch.randn(2, 4, 5, 16, 16), torch.tensor([3, 700]), torch.randn(2, 7, 24)
    mask = (torch.arange(7) < torch.tensor([7, 4])[:, None]).float()
    bias = ((1 - mask) * -10000.0).repeat_interleave(5, 0)[:, None]
    theirs = host(video, timestep, text, encoder_attention_mask=bias).sample
    ours = from_latte(host)(video, timestep, text=text, text_lengths=torch.tensor([7, 4]))
    exact = host.double()(video.double(), timestep, text.double(), encoder_attention_mask=bias.double()).sample
    assert error_ratio(ours, exact, [theirs]).worst <= 1


@pytest.mark.parametrize(
    "given,message",
    [
        ({"activation_fn": "geglu"}, "activation_fn must be 'gelu-approximate', got 'geglu'"),
        ({"norm_eps": 1e-5}, "norm_eps must be 1e-06, got 1e-05"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine must be False, got True"),
    ],
)
def test_another_latte(given, message):
    with pytest.raises(ValueError, match=f"from_latte: {message}"):
        from_latte(latte(**given))


# ---- inflation ----


@pytest.mark.parametrize("attention", ("factorized", "alternating"))
@pytest.mark.parametrize("modulation", MODULATION)
@pytest.mark.parametrize("position", ("sincos", "rope"))
def test_inflated_it_is_the_image_model_and_learns(attention, modulation, position):
    image = model_of(config(attention="spatial", modulation=modulation, position=position, qk_norm=True))
    model = inflate(image, attention=attention, mask=MASKS[2])
    video, timestep, keywords = inputs()
    out = model(video, timestep, **keywords)
    assert torch.equal(out, image(video, timestep, **keywords))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (model(video, timestep, **keywords) - video).square().mean().backward()
        optimizer.step()
    temporal = {name: p for name, p in model.named_parameters() if ".temporal." in name}
    assert temporal
    assert [name for name, p in temporal.items() if not p.grad.any()] == []
    other = video.clone()
    other[:, :, 2] += 1
    changed = (model(video, timestep, **keywords) - model(other, timestep, **keywords)).abs().amax((0, 1, 3, 4))
    assert (changed > 0).tolist() == [False, False, True, True]  # 2 and 3 are a chunk, which 0 and 1 do not see
