"""Scores far beyond what exp bears: the largest one still has all the weight, and no row sums to 0 or to NaN."""

import pytest
import torch

import vdcore

OPERATORS = {
    "spatial": lambda q, k, v, **how: vdcore.spatial_attention(q, k, v, return_lse=True, **how),
    "causal": lambda q, k, v, **how: vdcore.video_attention(
        q, k, v, mask=vdcore.FrameMask.causal(), return_lse=True, **how
    ),
    "windows": lambda q, k, v, **how: vdcore.video_attention(
        q, k, v, mask=vdcore.GridMask.neighborhood((1, 5, 5)), grid=(8, 9), return_lse=True, **how
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [1e2, 1.6e4, 3e4, 1e8, 1e15])
@pytest.mark.parametrize("name", OPERATORS)
def test_scores_far_beyond_what_exp_bears(name, magnitude, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 72, 2, 64) for _ in range(3))
    for keys in (q, k):  # a query that is its own key has a score far above the others
        inputs = [(x * size).to(dtype) for x, size in ((q, magnitude), (keys, magnitude), (v, 1))]
        out, lse = OPERATORS[name](*inputs, backend="cpu")
        exact, exact_lse = OPERATORS[name](*(x.double() for x in inputs))
        torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=1e-5, atol=1e-3)
        # Two keys whose scores differ by less than float32 knows share the weight as they like.
        alike = (out.double() - exact).abs().amax(-1) < 2**-6
        assert out.isfinite().all() and alike.double().mean() > 0.97, alike.double().mean()
