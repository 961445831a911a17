"""Tokens as the engine reads them: float32 rows where they lie, or copied where they are no equal distance apart or a
multiple of 1 KiB; blocks of rows that end inside a frame; one vector of patch values, two, and one of three."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vdcore
from vdcore.testing import TORCH_FORMS, error_ratio


def _tokens(layout: str, channels: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    held = torch.randn(2, 5, 36, channels + 8, generator=random)
    return {
        "dense": held[:, :3, :35, :channels].contiguous(),
        "rows apart": held[:1, :1, :35, :channels].expand(1, 3, 35, channels),
        "evenly apart": held[:, :3, :35].contiguous()[..., 8:],
        "frames apart": held[:, 1:4, 1:, :channels],
        "frames inside": held[:, :3, :35, :channels].transpose(1, 2).contiguous().transpose(1, 2),
    }[layout]


@pytest.mark.parametrize("channels", [3, 256, 264, 513])
@pytest.mark.parametrize("layout", ["dense", "rows apart", "evenly apart", "frames apart", "frames inside"])
def test_rows(layout: str, channels: int) -> None:
    tokens = _tokens(layout, channels)
    for out in (4, 9):
        weight = torch.randn(4 * out, channels, generator=torch.Generator().manual_seed(1)) / channels**0.5
        given = {"channels": out, "patch": (1, 2, 2), "grid": (3, 5, 7)}
        for dtype in (torch.float32, torch.bfloat16):
            x, w = tokens.to(dtype), weight.to(dtype)
            found = vdcore.unpatchify(x, w, backend="cpu", **given)
            exact = vdcore.unpatchify(x.double(), w.double(), backend="reference", **given)
            forms = [form(x, w, **given) for form in TORCH_FORMS["unpatchify"].values()]
            assert error_ratio(found, exact, forms).worst <= 1
