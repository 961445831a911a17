"""Presets have the sizes of their workloads."""

import pytest
import torch

from vdcore.models import PRESETS, VDiT
from vdcore_bench import workloads

WORKLOADS = workloads.load()


@pytest.mark.parametrize("name", PRESETS)
def test_the_workload_s_sizes(name):
    given, workload = PRESETS[name], WORKLOADS[name]
    shape = workload.shape()
    assert (given.heads, given.kv_heads or given.heads, given.head_dim) == (shape.H, shape.G, shape.D)
    channels, frames, height, width = workload.latent
    assert given.in_channels == channels
    assert given.patch == tuple(workload.patch)
    assert (shape.T, shape.rows, shape.columns) == (frames, height // given.patch[1], width // given.patch[2])
    if given.attention == "full":
        assert given.mask == workload.mask
    assert (given.text_width is not None) == (workload.text_tokens > 0)


def test_only_u_nets_are_left_out():
    assert {name for name, w in WORKLOADS.items() if name not in PRESETS} == {
        name for name, w in WORKLOADS.items() if w.patch is None
    }


def test_parameters_of_the_published_models():
    """In millions: DiT-XL/2 as its paper says; Latte-1 as its published configuration gives in diffusers."""
    for name, expected in (("dit-xl2-512", 675), ("latte-1-512", 1057)):
        with torch.device("meta"):
            model = VDiT(PRESETS[name])
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - expected) < 0.02 * expected
