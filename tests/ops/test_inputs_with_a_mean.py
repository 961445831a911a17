"""Gradients of inputs with a mean, which random normal numbers do not have: images, features after an activation.

A row of probabilities sums to 1, so the gradients of a row's scores sum to 0, and a mean of the keys must cancel from
the gradient of the query. An error that all keys of a row share would not.
"""

import pytest
import torch
from support import backends_of, check, dtypes_of

from vdcore import FrameMask
from vdcore.testing import Case


def uniform(d, name, *shape):
    return d.leaf(name, torch.rand(shape, generator=d.generator, dtype=torch.float64))


def shifted(d, name, *shape):
    return d(name, *shape, around=4.0)


def qkv(draw, d, B, T, S, H, D, T_k=0, G=0, prefix=""):
    q, k = (B, T, S, H, D), (B, T_k or T, S, G or H, D)
    return {n: draw(d, prefix + n, *shape) for n, shape in (("q", q), ("k", k), ("v", k))}


def gated(draw, d):
    spatial, temporal = (tuple(qkv(draw, d, 1, 2, 203, 1, 64, prefix=p).values()) for p in ("", "temporal_"))
    return {"spatial": spatial, "temporal": temporal, "gate": d("gate", 64, around=0.5, spread=0.2)}


def text(draw, d):
    words = tuple(draw(d, f"text_{n}", 1, 9, 2, 32) for n in "qkv")
    return {**qkv(draw, d, 1, 3, 60, 2, 32), "text": words, "mask": FrameMask.causal(), "return_lse": True}


def norms(draw, d):
    """A norm's weight adds up what all rows err by: keys of more than one tile, so that no row's are at hand."""
    words = tuple(draw(d, f"text_{n}", 1, 9, 2, 32) for n in "qkv")
    norm, text_norm = d.norm(2, 2, 32), d.norm(2, 2, 32, prefix="text_")
    return {**qkv(draw, d, 1, 3, 60, 2, 32), "text": words, "norm": norm, "text_norm": text_norm}


def cross(draw, d):
    k, v = (draw(d, n, 2, 200, 2, 40) for n in "kv")
    return {"q": draw(d, "q", 2, 2, 30, 2, 40), "k": k, "v": v, "lengths": d.integers(200, 140)}


CASES = {
    "spatial": ("spatial_attention", lambda draw, d: qkv(draw, d, 1, 2, 203, 2, 64)),
    "grouped heads": ("spatial_attention", lambda draw, d: qkv(draw, d, 1, 1, 160, 4, 24, G=2)),
    "one sequence": ("video_attention", lambda draw, d: qkv(draw, d, 1, 4, 83, 1, 40)),
    "window": (
        "video_attention",
        lambda draw, d: {**qkv(draw, d, 1, 6, 70, 1, 40), "mask": FrameMask(past=1, future=0, sink=1)},
    ),
    "text": ("video_attention", text),
    "text and norms": ("video_attention", norms),
    "cross": ("cross_attention", cross),
    "gated": ("gated_attention", gated),
    "temporal": ("temporal_attention", lambda draw, d: qkv(draw, d, 2, 16, 5, 2, 64)),
    "temporal, long": ("temporal_attention", lambda draw, d: {**qkv(draw, d, 1, 150, 2, 2, 72), "return_lse": True}),
    "temporal, long and masked": (
        "temporal_attention",
        lambda draw, d: {**qkv(draw, d, 1, 150, 2, 2, 64), "mask": FrameMask(past=20, future=3, sink=5)},
    ),
    "temporal, a long cache": (
        "temporal_attention",
        lambda draw, d: {**qkv(draw, d, 1, 60, 1, 1, 40, T_k=300), "mask": FrameMask.causal()},
    ),
}
ROUNDED = pytest.mark.xfail(strict=True, reason="delta comes from out, whose rounding all keys of a row share")
KNOWN = {("text and norms", torch.float16, shifted): ROUNDED}
COMPILED = [
    pytest.param(name, "cpu", dtype, draw, marks=KNOWN.get((name, dtype, draw), ()))
    for name, (op, _) in CASES.items()
    if "cpu" in backends_of(op)
    for dtype in dtypes_of("cpu")
    for draw in (uniform, shifted)
]
INTERPRETED = [  # the larger mean alone
    (name, "triton", torch.float16, shifted)
    for name, (op, _) in CASES.items()
    if "triton" in backends_of(op) and (name, torch.float16, shifted) not in KNOWN
]


@pytest.mark.parametrize(
    "name,backend,dtype,draw", COMPILED + INTERPRETED, ids=lambda x: x.__name__ if callable(x) else str(x)
)
def test_gradients(name, backend, dtype, draw):
    op, build = CASES[name]
    check(Case(op, name, lambda d: build(draw, d)), backend, dtype)
