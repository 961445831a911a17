"""Hazard 13: every head dim is right, or refused with a reason."""

import pytest
from support import backends_of, dtypes_of, skip_unless_runs

from vdcore import FrameMask
from vdcore.testing import Case, check

HEAD_DIMS = [1, 8, 40, 59, 64, 72, 80, 96, 104, 111, 128, 160, 256]


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


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("op,backend", [(op, b) for op in OPS for b in backends_of(op)])
def test_head_dim(op, backend, D):
    for dtype in dtypes_of(backend):
        case = case_of(op, D)
        skip_unless_runs(case, backend, dtype, requires_grad=True)
        check(case, backend, dtype)
