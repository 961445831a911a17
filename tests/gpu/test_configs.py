"""Hazards 14, 17: every row of every config table gives right numbers, forced in turn."""

import importlib
import pkgutil

import pytest
import torch

from vdcore import FrameMask
from vdcore.testing import Case, check

pytest.importorskip("triton")


def tables():
    """(operator, row) for every row of the attention kernels' tables that serves this GPU."""
    import vdcore_kernels
    from vdcore_kernels.core.launch import Config, arch_of

    if not torch.cuda.is_available():
        return []
    arch = arch_of(torch.empty(0, device="cuda"))
    found = []
    for info in pkgutil.walk_packages(vdcore_kernels.__path__, "vdcore_kernels."):
        room = info.name.removeprefix("vdcore_kernels.")
        for name, table in vars(importlib.import_module(info.name)).items():
            if name.isupper() and isinstance(table, tuple):
                rows = [row for row in table if isinstance(row, Config) and row.serves(arch)]
                found += [(room, row) for row in rows]
    return found


CASES = {
    "frame_attention.forward": ("video_attention", (1, 3, 150, 2), {"mask": FrameMask.window(1)}),
    **{
        f"frame_attention.{name}": ("video_attention", (1, 3, 150, 2), {"mask": FrameMask.window(1)})
        for name in ("backward_queries", "backward_keys")
    },
    "temporal_attention.forward": ("temporal_attention", (1, 30, 5, 2), {"mask": FrameMask.causal()}),
    "temporal_attention.backward": ("temporal_attention", (1, 30, 5, 2), {"mask": FrameMask.causal()}),
    "temporal_attention.long": ("temporal_attention", (1, 150, 2, 2), {"mask": FrameMask.window(40)}),
}


@pytest.mark.parametrize("module,row", tables(), ids=str)
def test_forced_row(module, row):
    from vdcore_kernels.core.launch import force

    if module not in CASES:
        pytest.skip("its rows differ in the size of what they hold: the cases choose among them")
    op, shape, more = CASES[module]
    D = 64 if getattr(row, "values", 1 << 20) >= 4096 else 40
    D = min(D, getattr(row, "channels", D))

    def build(d):
        return {**{name: d(name, *shape, D) for name in "qkv"}, **more}

    with force(row):
        check(Case(op, f"{module} {row.warps} warps", build), "triton", torch.bfloat16, device="cuda")
