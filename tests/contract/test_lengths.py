"""Lengths: below 0 counts as 0 and above the size as the size, on every backend; and every shape they may have with
every shape of keys."""

import pytest
import torch
from support import FAST, backends_of, check, dtype_of

import vdcore
from vdcore import FrameMask
from vdcore.testing import Case


def qkv(d, T, T_k, prefix=""):
    q, k, v = (d(prefix + n, 3, T if n == "q" else T_k, 4, 2, 16) for n in "qkv")
    return {"q": q, "k": k, "v": v}


def cross(keys):
    def args(d):
        k, v = (d(n, *keys, 5, 2, 16) for n in "kv")
        return {"q": d("q", 3, 2, 4, 2, 16), "k": k, "v": v}

    return args


def video(text_sees):
    def args(d):
        text = tuple(d(f"text_{n}", 3, 5, 2, 16) for n in "qkv")
        return {**qkv(d, 4, 4), "text": text, "text_sees": text_sees, "mask": FrameMask.window(1)}

    return args


def gated(d):
    spatial, temporal = (tuple(qkv(d, 4, 4, p).values()) for p in ("", "temporal_"))
    return {"spatial": spatial, "temporal": temporal, "gate": d("gate", 16), "mask": FrameMask.causal()}


# Arguments, what lengths they take, and what these count as.
FRAMES = ("lengths", [-1, 2, 9], [0, 2, 4])
CALLS = {
    "temporal": ("temporal_attention", lambda d: qkv(d, 4, 4), [FRAMES]),
    "temporal, window": ("temporal_attention", lambda d: {**qkv(d, 4, 4), "mask": FrameMask.window(2)}, [FRAMES]),
    "temporal, a cache": ("temporal_attention", lambda d: qkv(d, 2, 6), [("lengths", [-(2**62), 5, 2**62], [0, 5, 6])]),
    "video": ("video_attention", lambda d: qkv(d, 4, 4), [FRAMES]),
    "video and text": ("video_attention", video("all"), [FRAMES, ("text_lengths", [3, -2, 7], [3, 0, 5])]),
    "text that sees text": ("video_attention", video("text"), [FRAMES, ("text_lengths", [-7, 4, 99], [0, 4, 5])]),
    "gated": ("gated_attention", gated, [FRAMES]),
    "cross": ("cross_attention", cross((3,)), [("lengths", [-3, 2, 6], [0, 2, 5])]),
    "cross, keys per frame": ("cross_attention", cross((3, 2)), [("lengths", [-3, 2, 6], [0, 2, 5])]),
    "cross, lengths per frame": (
        "cross_attention",
        cross((3,)),
        [("lengths", [[-3, 2], [5, -1], [9, 0]], [[0, 2], [5, 0], [5, 0]])],
    ),
    "cross, both a frame": (
        "cross_attention",
        cross((3, 2)),
        [("lengths", [[-3, 2], [5, -1], [9, 0]], [[0, 2], [5, 0], [5, 0]])],
    ),
}
INTEGERS = (torch.int64, torch.int32)
ON_BACKENDS = [
    (name, b, integers)
    for number, (name, (op, _, _)) in enumerate(CALLS.items())
    for b in backends_of(op)
    if b != "sdpa"
    for integers in (INTEGERS if b in FAST else INTEGERS[number % 2 :][:1])  # interpreted kernels share them out
]


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in flat(part)]


@pytest.mark.parametrize("name,backend,integers", ON_BACKENDS, ids=str)
def test_what_lengths_count_as(name, backend, integers):
    op, build, lengths = CALLS[name]
    results = []
    for column in (1, 2):
        inputs = Case(op, name, build).inputs(dtype_of(backend), requires_grad=True)
        most = torch.iinfo(integers).max
        given = {entry[0]: torch.tensor(entry[column]).clamp(-most, most).to(integers) for entry in lengths}
        outputs = flat(getattr(vdcore, op)(**inputs.args, **given, backend=backend))
        total = sum(y.float().square().sum() for y in outputs)
        results.append([*outputs, *torch.autograd.grad(total, list(inputs.leaves.values()))])
    for strange, plain in zip(*results):
        torch.testing.assert_close(strange, plain, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [b for b in backends_of("cross_attention") if b != "sdpa"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("per_frame", [False, True], ids=["a prompt a sample", "a prompt a frame"])
@pytest.mark.parametrize("lengths", [[6, 2, 0], [[6, 1, 0], [-1, 5, 2], [0, 0, 0]]], ids=["a sample", "a frame"])
def test_every_pair_of_keys_and_lengths(backend, lengths, per_frame, norm):
    def build(d):
        keys = (3, 3) if per_frame else (3,)
        k, v = (d(n, *keys, 6, 2, 24) for n in "kv")
        weights = [d(f"{n}_weight", 24, around=1.0, spread=0.3) for n in "qk"] if norm else []
        args = {"q": d("q", 3, 3, 4, 4, 24), "k": k, "v": v, "lengths": torch.tensor(lengths), "return_lse": True}
        return args | ({"norm": vdcore.QKNorm(*weights)} if norm else {})

    check(Case("cross_attention", "pairs", build), backend, dtype_of(backend))
