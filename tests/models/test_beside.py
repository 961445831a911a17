"""Attention that starts at the token beside, as a convolution does."""

import itertools

import pytest
import torch

from vdcore.models import VDiT, VDiTConfig
from vdcore.models.position import full_rope, space_rope, time_rope
from vdcore.ops import qk_norm_rope

WIDTH, HEADS, GRID = 192, 6, (5, 5, 5)
ALONG = {"spatial": ((0, 1, 0), (0, 0, 1)), "temporal": ((1, 0, 0),), "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1))}


def layer_of(attention, branch=None, **given):
    torch.manual_seed(0)
    config = VDiTConfig(
        width=WIDTH, heads=HEADS, depth=1, attention=attention, position="rope", rope_theta=100.0, qk_norm=True, **given
    )
    return VDiT(config).blocks[0].layers[branch or attention]


def rope_of(kind):
    T, H, W = GRID
    positions, D = torch.arange(T).double(), WIDTH // HEADS
    if kind == "full":
        return full_rope(positions, (H, W), D, 100.0)
    return space_rope((H, W), D, 100.0, positions.device) if kind == "spatial" else time_rope(positions, D, 100.0)


@torch.no_grad()
def looked_at(layer, kind, branch=0):
    """Per head, how far from the middle token the key lies that it gives most weight to, averaged over samples."""
    T, H, W = GRID
    x = torch.randn(32, T, H * W, WIDTH)
    q, k, _ = layer.split(layer.qkv(x).chunk(layer.branches, -1)[branch])
    q, k = qk_norm_rope(q, k, norm=layer.norm(branch), rope=rope_of(kind))
    q, k = (y.unflatten(2, (H, W)) for y in (q, k))  # (B, T, H, W, heads, D)
    k = k.repeat_interleave(q.shape[-2] // k.shape[-2], -2)
    scores = torch.einsum("bhd,btyxhd->bhtyx", q[:, T // 2, H // 2, W // 2], k) * (WIDTH // HEADS) ** -0.5
    if kind == "spatial":
        scores = scores[:, :, T // 2].unsqueeze(2)
    elif kind == "temporal":
        scores = scores[..., H // 2, W // 2][..., None, None]
    weights = scores.flatten(2).softmax(-1).unflatten(-1, scores.shape[2:]).mean(0)
    at = [torch.unravel_index(w.argmax(), w.shape) for w in weights]
    middle = [n // 2 for n in weights.shape[1:]]
    return [tuple(int(i) - m for i, m in zip(found, middle)) for found in at]


@pytest.mark.parametrize(
    ("attention", "layer", "branch", "kind"),
    [
        ("factorized", "spatial", 0, "spatial"),
        ("factorized", "temporal", 0, "temporal"),
        ("gated", "gated", 0, "spatial"),
        ("gated", "gated", 1, "temporal"),
        ("full", "full", 0, "full"),
    ],
)
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_heads_take_turns_at_the_tokens_beside(attention, layer, branch, kind, kv_heads):
    directions = [tuple(s * d for d in axis) for axis, s in itertools.product(ALONG[kind], (1, -1))]
    found = looked_at(layer_of(attention, layer, beside=True, kv_heads=kv_heads), kind, branch)
    assert found == [directions[h % len(directions)] for h in range(HEADS)]


def test_left_to_itself_it_starts_anywhere():
    layer = layer_of("factorized", "spatial")
    assert not layer.qkv.bias.any()
    assert looked_at(layer, "spatial") != looked_at(layer_of("factorized", "spatial", beside=True), "spatial")


def test_needs_rope():
    with pytest.raises(ValueError, match="VDiTConfig: beside needs position rope"):
        VDiTConfig(position="sincos", beside=True)
