"""A row over very many keys: errors of the online softmax must not pile up from tile to tile."""

import pytest
import torch

import vdcore
from vdcore.testing import TORCH_FORMS, error_ratio

S, T, D = 256, 32, 64  # 8,192 keys, and the queries of the last frame


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(5)
    q, k, v, dy = (torch.randn(1, n, S, 1, D, generator=generator) for n in (1, T, T, 1))
    return {"q": q, "k": k, "v": v}, dy


def run(function, tensors, dy):
    tensors = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out, lse = function(**tensors, q_start=T - 1, return_lse=True)
    found = torch.autograd.grad(out, list(tensors.values()), dy.to(out.dtype))
    return [out.detach(), lse.detach(), *found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_video_attention_over_eight_thousand_keys(inputs, dtype):
    tensors, dy = inputs
    rounded = {name: x.to(dtype) for name, x in tensors.items()}
    wide = {name: x.double() for name, x in rounded.items()}
    ours = run(lambda **kw: vdcore.video_attention(**kw, backend="cpu"), rounded, dy.to(dtype))
    exact = run(lambda **kw: vdcore.video_attention(**kw, backend="reference"), wide, dy.to(dtype))
    forms = [run(form, rounded, dy.to(dtype)) for form in TORCH_FORMS["video_attention"].values()]
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        ratio = error_ratio(ours[i], exact[i], [form[i] for form in forms], gradient=i > 1)
        assert ratio.worst <= 1, (name, ratio)


@pytest.mark.parametrize(
    "mask", [vdcore.FrameMask(), vdcore.GridMask.window(None, None, 15, 14)], ids=["all", "windows"]
)
def test_no_channel_is_taken_to_have_a_mean_by_chance(mask):
    """Values are summed up less their mean where they have one; of channels without one none errs more than others."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, S, 16, D, generator=generator) for n in (1, 16, 16))
    given = {"mask": mask, "q_start": 15, **({"grid": (16, 16)} if isinstance(mask, vdcore.GridMask) else {})}
    ours = vdcore.video_attention(q, k, v, backend="cpu", **given)
    exact = vdcore.video_attention(q.double(), k.double(), v.double(), backend="reference", **given)
    errors = (ours - exact).square().mean((0, 1, 2)).sqrt()  # (H, D)
    assert (errors.amax(-1) < 2 * errors.median(-1).values).all()
