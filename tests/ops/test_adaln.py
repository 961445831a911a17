"""Rows of adaptive layer norm."""

import pytest
import torch
from support import DTYPES

import vdcore
from vdcore.ops.native import missing as why_no_native


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("channels", [5, 24, 67])
def test_a_row_does_not_depend_on_its_neighbours(channels, kind, dtype):
    """A row of the CPU engine has the bits that it has alone, whatever shift and scale its neighbours have."""
    if why_no_native() is not None:
        pytest.skip(why_no_native())
    torch.manual_seed(0)
    B, T, S = 2, 4, 3  # four rows meet the same row of shift in their first and last, and another one between
    x = torch.randn(B, T, S, channels).to(dtype)
    weight, bias = torch.randn(2, channels)
    shifts = torch.randn(B, channels), torch.randn(B, T, channels), torch.randn(B, 1, S, channels).expand_as(x)
    for shift in shifts:
        run = {"kind": kind, "weight": weight, "bias": bias, "backend": "cpu"}
        y = vdcore.modulate(x, shift, 2 * shift, **run)
        full = shift if shift.ndim == 4 else shift[:, None, None] if shift.ndim == 2 else shift[:, :, None]
        full = full.expand_as(x)
        for b, t, s in torch.cartesian_prod(*map(torch.arange, (B, T, S))).tolist():
            at = (slice(b, b + 1), slice(t, t + 1), slice(s, s + 1))
            alone = vdcore.modulate(x[at], full[at], 2 * full[at], **run)
            assert torch.equal(y[at], alone), (b, t, s)
