"""The kernels for AMX's tiles, on the emulated twin of the tiles, which every machine runs.

A machine that has AMX runs them as ``auto``, in every other test. The twin follows the documented semantics of the
instructions; what it cannot know is time, so products of tiles are counted here instead.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from support import run_python

from vdcore_bench.workloads import load

ROOT = Path(__file__).parents[2]
EMULATED = {"VDCORE_CPU_ISA": "amx-emulated"}
TILE = 16 * 16 * 32  # multiply-adds of one product of tiles
FRAMES = {"spatial_attention", "video_attention", "cross_attention", "gated_attention"}
MOST_TOKENS = 400  # of a frame here: more only repeat the same tiles

COUNT = """
import json, torch, vdcore
from vdcore.ops.native import native
torch.set_num_threads(1)

def count(call):
    before = native().tile_products()
    call()
    return native().tile_products() - before

def attention(S, D):
    q, k, v = (torch.randn(1, 1, S, 1, D).bfloat16().requires_grad_() for _ in range(3))
    outs = []
    forward = count(lambda: outs.append(vdcore.spatial_attention(q, k, v, backend="cpu")))
    return forward, count(lambda: outs[0].sum().backward())

def temporal(T, D):
    qkv, tangents = torch.randn(2, 3, 1, T, 3, 2, D).bfloat16()

    def attend(q, k, v):
        return vdcore.temporal_attention(q, k, v, backend="cpu")

    return count(lambda: attend(*qkv)), count(lambda: torch.func.jvp(attend, tuple(qkv), tuple(tangents)))

def patches(C, size, E):
    video = torch.randn(1, C, 1, 2 * size, 2 * size).bfloat16()
    weight = torch.randn(E, C, 1, 2, 2).bfloat16()
    tokens = []
    into = count(lambda: tokens.append(vdcore.patchify(video, weight, backend="cpu")))
    back = weight.reshape(E, -1).T.contiguous()
    args = dict(channels=C, patch=(1, 2, 2), grid=(1, size, size), backend="cpu")
    return into, count(lambda: vdcore.unpatchify(tokens[0], back, **args))

print(json.dumps([CALL(*size) for size in SIZES]))
"""


def counts(call, sizes):
    """Products of tiles that a call takes, one thread."""
    code = COUNT.replace("CALL", call).replace("SIZES", repr(sizes))
    return json.loads(run_python(code, **EMULATED))


ATTENTION = [FRAMES, {"temporal_attention"}]


@pytest.mark.parametrize("operators", [*ATTENTION, {"patchify", "unpatchify"}], ids=min)
def test_cases_in_bfloat16(operators):
    """The tolerance rule; other dtypes are another instruction set's."""
    code = (
        f"""
operators = {operators}
"""
        + """
import torch, vdcore
from vdcore.ops.native import native
from vdcore.testing import CASES, check
used = set()
for case in [case for case in CASES if case.op in operators]:
    inputs = case.inputs(torch.bfloat16, requires_grad=True)
    if dict(vdcore.explain(case.op, **inputs.args))["cpu"] is not None:
        continue
    before = native().tile_products()
    check(case, "cpu", torch.bfloat16)
    if native().tile_products() > before:
        used.add(case.op)
assert used == operators
print(native().cpu_isa())
"""
    )
    assert run_python(code, OMP_NUM_THREADS=1, **EMULATED).strip() == "amx-emulated"


@pytest.mark.parametrize("operators", [*ATTENTION, {"tile_attention"}], ids=min)
def test_tangents_of_cases_in_bfloat16(operators):
    code = (
        f"""
operators = {operators}
"""
        + """
import torch, vdcore
from vdcore.testing import CASES, judge_tangents
for case in [case for case in CASES if case.op in operators]:
    before = vdcore.calls()[case.op, "cpu", "jvp"]
    ratios = judge_tangents(case, "cpu", torch.bfloat16)
    assert all(r.worst <= 1 for r in ratios.values()), (case, ratios)
    assert vdcore.calls()[case.op, "cpu", "jvp"] == before + 4, case
"""
    )
    run_python(code, OMP_NUM_THREADS=1, **EMULATED)


def test_no_other_instruction_set_has_emulated_tiles():
    code = "from vdcore.ops.native import native; print(native().tile_products())"
    assert run_python(code, VDCORE_CPU_ISA="baseline").strip() == "None"
    refused = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "VDCORE_CPU_ISA": "amx2"}, capture_output=True, text=True
    )
    assert "VDCORE_CPU_ISA must be one of" in refused.stderr and "amx-emulated" in refused.stderr


def up(n, of):
    return -(-n // of) * of


@cache
def shapes():
    return sorted({(min(w.tokens_per_frame, MOST_TOKENS), w.head_dim) for w in load().values()})


def test_products_of_attention_are_those_of_its_padded_shape():
    """Scores pad channels to 32, results to 16; keys of a tile pad to 32, and the last queries to a panel of 32."""
    for (S, D), (forward, backward) in zip(shapes(), counts("attention", shapes())):
        terms, row = up(D, 32), up(D, 16)
        assert forward * TILE == up(S, 32) * up(S, 32) * (terms + row), (S, D)
        assert 5 * S * S * D <= backward * TILE <= up(S, 32) ** 2 * (2 * terms + 3 * row), (S, D)


def test_products_of_temporal_attention_are_those_of_its_padded_shape():
    """Frames pad to 16, and as terms of results to 32; so many for each of 2 heads at 3 positions.

    With all tangents there are three of scores and two of results beside forward's own.
    """
    sizes = [(8, 40), (16, 72), (17, 64), (32, 128), (64, 64)]
    for (T, D), (forward, pushed) in zip(sizes, counts("temporal", sizes)):
        scores, results = up(T, 16) ** 2 * up(D, 32), up(T, 16) * up(D, 16) * up(T, 32)
        assert forward * TILE == 6 * (scores + results), (T, D)
        assert (pushed - forward) * TILE == 6 * (3 * scores + 2 * results), (T, D)


def test_products_of_patches_are_those_of_their_padded_shape():
    sizes = [(4, 8, 1152), (16, 6, 1536), (12, 5, 72)]  # channels, tokens along a side, channels of a token
    for (C, side, E), (into, back) in zip(sizes, counts("patches", sizes)):
        tokens = up(side * side, 32)
        assert into * TILE == tokens * up(4 * C, 32) * up(E, 32)
        assert back * TILE == tokens * up(4 * C, 16) * up(E, 32)


SWEEP = (
    "test_pairs.py",
    "contract/test_determinism.py",
    "contract/test_head_dims.py",
    "contract/test_layouts.py",
    "contract/test_lengths.py",
    "contract/test_nan.py",
    "contract/test_rows_that_see_nothing.py",
    "ops/test_inputs_with_a_mean.py",
    "ops/test_many_keys.py",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEP)
def test_sweep(name):
    """What the engine is held to elsewhere, on the twin; float32 is the baseline's."""
    operators = "spatial or temporal or video or cross or gated or patchify or many_keys"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", f"tests/{name}"]
    done = subprocess.run(
        [*command, "-k", f"({operators}) and not triton and not cuda and not sdpa and not reference and not fp32"],
        env={**os.environ, **EMULATED},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]  # 5 where no test has such a name
