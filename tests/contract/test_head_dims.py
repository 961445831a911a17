"""Hazard 13: every head dim is right, or refused with a reason."""

import pytest
from support import FAST, backends_of, check, dtypes_of, skip_unless_runs

from vdcore import FrameMask
from vdcore.testing import Case

HEAD_DIMS = [1, 8, 40, 59, 64, 72, 80, 96, 104, 111, 128, 160, 256]
# For interpreted kernels: short of a power of 2, ragged, odd, widest.
FEW = [40, 72, 111, 256]


def case_of(op, D):
    def build(d):
        if op == "cross_attention":
            return {"q": d("q", 1, 2, 3, 2, D), "k": d("k", 1, 7, 2, D), "v": d("v", 1, 7, 2, D)}
        shape = (1, 9, 2, 2, D) if op == "temporal_attention" else (1, 2, 9, 2, D)
        if op == "gated_attention":
            triples = [tuple(d(f"{p}{n}", *shape) for n in "qkv") for p in ("", "temporal_")]
            return {"spatial": triples[0], "temporal": triples[1], "gate": d("gate", D, around=0.5, spread=0.2)}
        args = {n: d(n, *shape) for n in "qkv"}
        return args if op == "spatial_attention" else {**args, "mask": FrameMask.window(2)}

    return Case(op, f"head dim {D}", build)


OPS = ["temporal_attention", "spatial_attention", "video_attention", "gated_attention", "cross_attention"]


TRIALS = [(op, b, D) for op in OPS for b in backends_of(op) for D in (HEAD_DIMS if b in FAST else FEW)]


@pytest.mark.parametrize("op,backend,D", TRIALS)
def test_head_dim(op, backend, D):
    dtypes = dtypes_of(backend)
    # An emulated kernel is compiled once per dtype, and is one source: the dims share them out.
    for dtype in dtypes if backend in FAST else [dtypes[FEW.index(D) % len(dtypes)]]:
        case = case_of(op, D)
        skip_unless_runs(case, backend, dtype, requires_grad=True)
        check(case, backend, dtype)
