"""Rotary tables whose cosines and sines differ: in dtype, and in how they lie."""

import pytest
import torch
from support import FAST, backends_of, check, dtypes_of

import vdcore
from vdcore import Rope
from vdcore.testing import Case

F, S, PAIRS = 4, 5, 8
DRAWS = {
    "float32 cosines": lambda d: (d("cos", F, S, PAIRS, dtype=torch.float32), d("sin", F, S, PAIRS)),
    "float32 sines": lambda d: (d("cos", F, S, PAIRS), d("sin", F, S, PAIRS, dtype=torch.float32)),
    "cosines that frames and tokens share": lambda d: (
        d("cos", 1, 1, PAIRS).expand(F, S, PAIRS),
        d("sin", F, S, PAIRS),
    ),
    "cosines that heads share": lambda d: (
        d("cos", F, S, 1, PAIRS).expand(F, S, 2, PAIRS),
        d("sin", F, S, 2, PAIRS),
    ),
    "sines that heads share": lambda d: (d("cos", F, S, 2, PAIRS), d("sin", F, 1, 1, PAIRS).expand(F, S, 2, PAIRS)),
    "sines that tokens share": lambda d: (d("cos", F, S, PAIRS), d("sin", F, 1, PAIRS).expand(F, S, PAIRS)),
}
OPS = ("qk_norm_rope", "temporal_attention", "spatial_attention")
STYLES = ("interleaved", "half")
TRIALS = [
    (name, style, op, b)
    for number, name in enumerate(DRAWS)
    for op in OPS
    for b in backends_of(op, ("reference", "cpu", "triton"))
    for style in (STYLES if b in FAST else STYLES[number % 2 :][:1])  # interpreted kernels share them out
]


@pytest.mark.parametrize("name,style,op,backend", TRIALS)
def test_tables(name, style, op, backend):
    def build(d):
        q, k = d("q", 2, F, S, 2, 24), d("k", 2, F, S, 2, 24)
        values = {} if op == "qk_norm_rope" else {"v": d("v", 2, F, S, 2, 24)}
        return {"q": q, "k": k, **values, "rope": Rope(*DRAWS[name](d), style)}

    check(Case(op, name, build), backend, dtypes_of(backend)[-1] if backend == "cpu" else torch.float16)


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("pairs", [1, 3, 8])
def test_channels_that_are_not_rotated_stay_as_they_are(backend, style, pairs):
    """Bit by bit: an infinite neighbor stays out of them, and a negative zero is one."""
    q = torch.ones(1, F, S, 2, 24, dtype=torch.float16)
    q[..., 2 * pairs :: 3] = float("inf")
    q[..., 2 * pairs + 1 :: 3] = -0.0
    angle = torch.full((F, S, pairs), 0.5)
    found = vdcore.qk_norm_rope(q, q, rope=Rope(angle.cos(), angle.sin(), style), backend=backend)
    for y in found:
        same_bits = y[..., 2 * pairs :].view(torch.int16) == q[..., 2 * pairs :].view(torch.int16)
        assert same_bits.all() and y[..., : 2 * pairs].isfinite().all()
