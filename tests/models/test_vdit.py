"""VDiT: what it computes, for every choice of its configuration."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from vdits import MASKS, SIZE, config, doubled, in_plain_torch, inputs, model_of, ratio, to_double

from vdcore import FrameMask
from vdcore.models import VDiT, VDiTConfig, position
from vdcore.models.config import ATTENTION, GATE, MODULATION, POSITION
from vdcore.testing import error_ratio

CHOICES = [
    config(attention=a, modulation=m, position=p, qk_norm=p != "sincos", gate=GATE[i % 3], mask=MASKS[i % 4])
    for i, (a, m, p) in enumerate(itertools.product(ATTENTION, MODULATION, POSITION))
]


def name_of(given):
    return f"{given.attention}-{given.modulation}-{given.position}"


@pytest.mark.parametrize("given", CHOICES, ids=name_of)
def test_numbers(given):
    model, (video, timestep, keywords) = model_of(given), inputs(per_frame=given.modulation == "zero")
    with torch.no_grad():
        out = model(video, timestep, **keywords)
    assert out.shape == video.shape
    assert ratio(model, out, video, timestep, **keywords) <= 1


@pytest.mark.parametrize("given", CHOICES, ids=name_of)
def test_every_parameter_learns(given):
    model, (video, timestep, keywords) = model_of(given), inputs()
    model(video, timestep, **keywords).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_few_steps_open_every_gate(attention):
    """From the initial weights, where gates and prediction are 0, every parameter but unused labels gets a gradient."""
    given = config(attention=attention, text_width=None, classes=None, qk_norm=True, mlp_ratio=2.0)
    model, (video, timestep, _) = VDiT(given), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        F.mse_loss(model(video, timestep), video).backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients(attention):
    """Of the first block's modulation, through everything after it, against float64."""
    given = config(attention=attention, position="rope", qk_norm=True, mask=MASKS[2], gate="token")
    model, (video, timestep, keywords) = model_of(given), inputs()
    weigh = torch.randn(video.shape)

    def gradient(of, cast):
        out = of(cast(video), timestep, **{name: cast(x) for name, x in keywords.items()})
        return torch.autograd.grad((out * weigh).sum(), of.blocks[0].modulation.proj.weight)[0]

    ours = gradient(model, lambda x: x)
    with in_plain_torch("naive"):
        plain = gradient(model, lambda x: x)
    assert error_ratio(ours, gradient(doubled(model), to_double), [plain], gradient=True).worst <= 1


def test_a_block_is_its_formula():
    """The factorized block under AdaLN-Zero, written out."""
    given = config(attention="factorized", position="sincos", depth=1)
    model, (video, timestep, keywords) = model_of(given), inputs()
    block = model.blocks[0]
    x, context = model.embed(video, timestep, **keywords)
    rows = block.modulation.proj(F.silu(context.condition)).unflatten(-1, (9, -1))[:, :, None, None]
    B, T, S, C = x.shape

    def norm(x, i):
        return F.layer_norm(x, (C,), eps=1e-6) * (1 + rows[:, i + 1]) + rows[:, i]

    def attend(layer, x):  # (N, n, C)
        q, k, v = layer.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    y = x
    spatial = attend(block.layers["spatial"], norm(y, 0).flatten(0, 1)).unflatten(0, (B, T))
    y = y + rows[:, 2] * spatial
    temporal = attend(block.layers["temporal"], norm(y, 3).transpose(1, 2).flatten(0, 1))
    y = y + rows[:, 5] * temporal.unflatten(0, (B, S)).transpose(1, 2)
    cross = block.layers["cross"]
    q = cross.q(y).unflatten(-1, (2, -1)).flatten(1, 2).transpose(1, 2)
    k, v = cross.kv(context.text).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4)
    seen = torch.arange(5) < keywords["text_lengths"][:, None]
    text = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
    y = y + cross.proj(text.transpose(1, 2).flatten(2)).unflatten(1, (T, S))
    mlp = block.layers["mlp"]
    y = y + rows[:, 8] * mlp.proj(F.gelu(mlp.up(norm(y, 6)), approximate="tanh"))
    torch.testing.assert_close(block(x, context), y, rtol=1e-4, atol=1e-4)


def test_closed_gates_pass_the_input_on():
    given = config(text_width=None, depth=1)
    model, (video, timestep, _) = VDiT(given), inputs()
    x, context = model.embed(video, timestep)
    assert torch.equal(model.blocks[0](x, context), x)
    assert not model(video, timestep).any()


# ---- conditions ----


def test_one_timestep_is_the_same_timestep_for_every_frame():
    for modulation in MODULATION:
        model, (video, timestep, keywords) = model_of(config(modulation=modulation)), inputs()
        each = timestep[:, None].expand(-1, SIZE[2])
        torch.testing.assert_close(model(video, timestep, **keywords), model(video, each, **keywords))


def test_a_token_of_several_frames_has_their_largest_timestep():
    model, (video, timestep, keywords) = model_of(config(patch=(2, 2, 2))), inputs()
    frames = timestep[:, None] * torch.tensor((0.25, 1.0, 1.0, 0.5))
    torch.testing.assert_close(model(video, timestep, **keywords), model(video, frames, **keywords))


def test_a_frame_s_timestep_changes_other_frames_only_through_attention():
    model, (video, timestep, keywords) = model_of(config(attention="spatial")), inputs(per_frame=True)
    other = timestep.clone()
    other[:, 2] += 100
    changed = (model(video, timestep, **keywords) - model(video, other, **keywords)).abs().amax((0, 1, 3, 4))
    assert (changed > 0).tolist() == [False, False, True, False]


def test_text_past_its_length_is_not_read():
    model, (video, timestep, keywords) = model_of(config()), inputs()
    text = keywords["text"].clone()
    text[1, 3:] = torch.nan
    expected = model(video, timestep, **keywords)
    assert torch.equal(model(video, timestep, **{**keywords, "text": text}), expected)


def test_text_per_frame():
    model, (video, timestep, keywords) = model_of(config()), inputs()
    text, lengths = keywords["text"], keywords["text_lengths"]
    each = {"text": text[:, None].expand(-1, SIZE[2], -1, -1), "text_lengths": lengths[:, None].expand(-1, SIZE[2])}
    torch.testing.assert_close(
        model(video, timestep, **{**keywords, **each}), model(video, timestep, **keywords), rtol=1e-4, atol=1e-5
    )


def test_no_label_is_the_class_after_the_last():
    model, (video, timestep, keywords) = model_of(config()), inputs()
    keywords["label"] = torch.tensor([4, 4])
    expected = model(video, timestep, **keywords)
    assert torch.equal(model(video, timestep, **{**keywords, "label": None}), expected)


# ---- positions and masks ----


@pytest.mark.parametrize("where", POSITION)
@pytest.mark.parametrize("attention", ("factorized", "full"))
def test_positions(attention, where):
    model, (video, timestep, keywords) = model_of(config(attention=attention, position=where)), inputs()
    positions = torch.arange(4, dtype=torch.float64)
    out = model(video, timestep, **keywords)
    assert torch.equal(model(video, timestep, positions=positions, **keywords), out)
    assert not torch.allclose(model(video, timestep, positions=positions / 2, **keywords), out)
    moved = model(video, timestep, positions=positions + 1000.5, **keywords)
    assert torch.allclose(moved, out, rtol=1e-3, atol=1e-4) == (where != "sincos")  # rotations know distances only


def test_position_tables_are_their_formulas():
    from vdcore import axial_rope

    grid, D = (3, 5), 24
    frames = torch.arange(4)
    side = 2 * (D // 6)
    full, expected = position.full_rope(frames, grid, D, 1e4), axial_rope((4, *grid), (D - 2 * side, side, side))
    torch.testing.assert_close(full.cos, expected.cos)
    torch.testing.assert_close(full.sin, expected.sin)
    space = position.space_rope(grid, D, 1e4, torch.device("cpu"))
    expected = axial_rope((4, *grid), (0, D // 2, D // 2))
    torch.testing.assert_close(space.cos, expected.cos)
    torch.testing.assert_close(space.sin, expected.sin)
    time, expected = position.time_rope(frames, D, 1e4), axial_rope((4, 1, 1), (D, 0, 0))
    torch.testing.assert_close(time.sin, expected.sin)


@pytest.mark.parametrize("attention", ("factorized", "alternating", "gated", "full"))
def test_the_mask_hides_frames(attention):
    """Frame 2 changes; who cannot see it, in any number of layers, keeps the same bits."""
    model = model_of(config(attention=attention, mask=FrameMask(past=0, future=0, chunk=2)))
    video, timestep, keywords = inputs()
    other = video.clone()
    other[:, :, 2] += 1
    changed = (model(video, timestep, **keywords) - model(other, timestep, **keywords)).abs().amax((0, 1, 3, 4))
    assert (changed > 0).tolist() == [False, False, True, True]


def test_patches_over_frames():
    given = config(patch=(2, 3, 2))
    model, (video, _, keywords) = model_of(given), inputs()
    timestep = torch.rand(2, 2)
    assert model(video, timestep, positions=torch.tensor([0.0, 3.5]), **keywords).shape == SIZE


def test_fewer_key_heads():
    given = config(kv_heads=1, attention="factorized", qk_norm=True, position="rope")
    model, (video, timestep, keywords) = model_of(given), inputs()
    with torch.no_grad():
        assert ratio(model, model(video, timestep, **keywords), video, timestep, **keywords) <= 1


# ---- learning ----


def test_it_learns_a_clip():
    """A tiny model learns to denoise one moving square from heavy noise."""
    torch.manual_seed(0)
    given = VDiTConfig(in_channels=1, width=48, depth=2, heads=2, patch=(1, 4, 4), qk_norm=True)
    model = VDiT(given)
    clip = torch.zeros(4, 1, 6, 16, 16)
    for t in range(6):
        clip[..., t, 4:8, 2 * t : 2 * t + 4] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    losses = []
    for _ in range(100):
        noise = 0.7 * torch.rand(4, 1, 1, 1, 1)
        noisy = torch.lerp(clip, torch.randn(clip.shape), noise)
        loss = F.mse_loss(model(noisy, 1000 * noise.flatten()), clip)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.15 * losses[0]  # losses[0] is the clip's mean square: the prediction starts at 0
