"""Paths of the Triton kernels that the cases of every operator do not take, under the interpreter."""

import pytest
import torch
from support import backends_of, check

import vdcore
from vdcore import FrameMask, QKNorm, Rope, axial_rope
from vdcore.testing import Case

pytestmark = pytest.mark.skipif("triton" not in backends_of("temporal_attention"), reason="needs triton")


def constant_rope(F, S, R, style="interleaved"):
    table = axial_rope((F, S, 1), (R // 2 // 2 * 2, R - R // 2 // 2 * 2, 0) if S > 1 else (R, 0, 0), style=style)
    return Rope(table.cos, table.sin, style)


def qkv(d, *shape, T_k=None, G=None):
    B, T, S, H, D = shape
    kv = (B, T_k or T, S, G or H, D)
    return {"q": d("q", *shape), "k": d("k", *kv), "v": d("v", *kv)}


def norm(d, D, kind):
    names = ("q_weight", "k_weight") + (("q_bias", "k_bias") if kind == "layer" else ())
    w = {name: d(name, D, around=1.0 if name.endswith("weight") else 0.0, spread=0.3) for name in names}
    return QKNorm(w["q_weight"], w["k_weight"], kind, "head", 1e-5, w.get("q_bias"), w.get("k_bias"))


TURNED = {
    "rms, rope": lambda d: {**qkv(d, 2, 5, 3, 2, 24), "norm": norm(d, 24, "rms"), "rope": constant_rope(5, 1, 24)},
    "layer, half rope of some channels, window": lambda d: {
        **qkv(d, 1, 7, 3, 2, 40),
        "norm": norm(d, 40, "layer"),
        "rope": constant_rope(7, 1, 24, "half"),
        "mask": FrameMask.window(2),
    },
    "rope per token, grouped heads, lengths": lambda d: {
        **qkv(d, 2, 4, 5, 4, 16, G=2),
        "norm": norm(d, 16, "rms"),
        "rope": constant_rope(4, 5, 16),
        "lengths": d.integers(4, 2),
    },
    "norm alone, a cache": lambda d: {
        **qkv(d, 1, 2, 4, 2, 72, T_k=6),
        "norm": norm(d, 72, "layer"),
        "mask": FrameMask.causal(),
        "return_lse": True,
    },
    "rope alone": lambda d: {**qkv(d, 1, 6, 3, 2, 16), "rope": constant_rope(6, 3, 8)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", TURNED)
def test_norm_and_rope_with_a_constant_table(name, dtype):
    check(Case("temporal_attention", name, TURNED[name]), "triton", dtype)


@pytest.mark.parametrize("op", ["cross_attention", "spatial_attention"])
def test_scores_of_rows_that_see_one_key_have_no_gradient(op):
    """Delta comes from the rounded result, and is put right by the row's sum before the keys take it."""
    key = (2, 1, 2, 16) if op == "cross_attention" else (2, 5, 1, 2, 16)
    q, k, v = (torch.randn(size, requires_grad=True) for size in ((2, 5, 1, 2, 16), key, key))
    out = getattr(vdcore, op)(q, k, v, backend="triton")
    dq, dk, _ = torch.autograd.grad(out, (q, k, v), torch.randn(out.shape))
    assert dq.abs().max() <= 1e-7 and dk.abs().max() <= 1e-7


def far_apart(x):
    """Frames that are not evenly spaced tokens: each followed by one more, which is NaN."""
    whole = torch.full((*x.shape[:2], x.shape[2] + 1, *x.shape[3:]), torch.nan, dtype=x.dtype)
    whole[:, :, :-1] = x
    return whole[:, :, :-1]


@pytest.mark.parametrize("text", [False, True])
def test_frames_with_gaps_between_them(text):
    import vdcore

    q, k, v = (torch.randn(1, 3, 7, 2, 16) for _ in range(3))
    words = {"text": tuple(torch.randn(1, 5, 2, 16) for _ in range(3))} if text else {}
    results = []
    for backend, move in (("triton", far_apart), ("reference", lambda x: x)):
        leaves = [move(x).requires_grad_() for x in (q, k, v)]
        out = vdcore.video_attention(*leaves, mask=FrameMask.window(1), backend=backend, **words)
        out = torch.cat([x.flatten(1, 2) if x.ndim == 5 else x for x in out], 1) if text else out
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_few_keys_many_queries():
    """A prompt's gradient is shared by several programs, whose parts are then summed."""

    def build(d):
        return {"q": d("q", 1, 3, 260, 1, 16), "k": d("k", 1, 5, 1, 16), "v": d("v", 1, 5, 1, 16)}

    check(Case("cross_attention", "shared by programs", build), "triton")


def test_one_prompt_read_differently_by_every_frame():
    def build(d):
        q, k, v = d("q", 2, 3, 4, 2, 16), d("k", 2, 6, 2, 16), d("v", 2, 6, 2, 16)
        return {
            "q": q,
            "k": k,
            "v": v,
            "lengths": d.integers(6, 1, 0, 3, 5, 2).reshape(2, 3),
            "norm": norm(d, 16, "rms"),
        }

    check(Case("cross_attention", "lengths per frame", build), "triton")


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales_that_are_not_positive(scale):
    def build(d):
        text = tuple(d(f"text_{n}", 1, 5, 2, 16) for n in "qkv")
        return {**qkv(d, 1, 2, 40, 2, 16), "text": text, "scale": scale, "return_lse": True}

    check(Case("video_attention", f"scale {scale}", build), "triton")
    check(Case("temporal_attention", f"scale {scale}", lambda d: {**qkv(d, 1, 4, 3, 2, 16), "scale": scale}), "triton")


def test_a_sink_that_ends_inside_a_chunk():
    def build(d):
        return {**qkv(d, 1, 8, 3, 2, 16), "mask": FrameMask(past=0, future=0, chunk=3, sink=2)}

    check(Case("video_attention", "sink inside a chunk", build), "triton")
    check(Case("temporal_attention", "sink inside a chunk", build), "triton")


@pytest.mark.slow  # the long kernels by themselves: the next test; the gate: its cases
def test_gate_over_a_long_video():
    def build(d):
        triples = [tuple(d(f"{p}{n}", 1, 130, 2, 1, 16) for n in "qkv") for p in ("", "temporal_")]
        return {
            "spatial": triples[0],
            "temporal": triples[1],
            "gate": d("gate", 16, around=0.5, spread=0.2),
            "mask": FrameMask.window(9),
            "lengths": d.integers(128),
        }

    check(Case("gated_attention", "long", build), "triton")


def test_norm_over_a_long_video():
    def build(d):
        return {**qkv(d, 1, 129, 1, 1, 16), "norm": norm(d, 16, "rms"), "rope": constant_rope(129, 1, 16)}

    check(Case("temporal_attention", "long, norm and rope", build), "triton")
