"""Hazards 3, 14: every kernel and config compiles for every architecture, does not spill, fits, counts in 64 bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.compile(
        *("kernels/**/*.py", "bench/vdcore_bench/aot.py", "vdcore/ops/**/*.py", "tests/build/compiled.py"),
        tools=["triton"],
    ),
    pytest.mark.timeout(1500),
]

SCRIPT = Path(__file__).with_name("compiled.py")


def compiled(*arguments):
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def problems(records):
    return [
        f"{r['arch']} {r['kernel']} ({r['config']}) for {r['call']}: {r['problem']}" for r in records if r["problem"]
    ]


def test_every_call_on_hopper():
    records = compiled("report", "sm_90", "all")
    assert len(records) > 100
    assert not problems(records)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_120"])
def test_every_call_on_small_gpus(arch):
    """99 KB of shared memory on two of them, and products by warps: the tables have rows of their own."""
    records = compiled("report", arch, "all")
    assert len(records) > 100
    assert not problems(records)


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_some_calls_elsewhere(arch):
    records = compiled("report", arch, "few")
    assert len({r["kernel"] for r in records}) >= 15
    assert not problems(records)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_row_of_the_tables_is_taken(arch):
    """A row that no call takes is never compiled, and nothing is known about it."""
    rows = compiled("rows", arch)
    assert len(rows) > 20
    assert not [name for name, taken in rows.items() if not taken]


@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
def test_no_warp_multiplies_what_another_does(arch):
    """Where warps multiply on their own, a tile with less rows than they hold together is multiplied several times."""
    found = compiled("products", arch)
    assert len({kernel["kernel"] for kernel in found}) == 7
    # More would not fit: registers hold queries and their tangents, 99 KB of shared memory keys and values.
    excused = {("frame_attention_jvp_kernel", D) for D in (160, 256)}
    if arch == "sm_89":
        excused |= {("frame_attention_bwd_kv_kernel", D) for D in (160, 256)}
    assert {(k["kernel"], k["channels"]) for k in found if set(k["loops"]) != {k["needed"]}} == excused


def test_no_program_id_is_multiplied_by_a_stride_in_32_bits():
    found = compiled("narrow", "sm_90")
    assert found.pop("careless_kernel"), "the check must see what is wrong"
    assert len(found) >= 15
    assert not {name: lines for name, lines in found.items() if lines}


def test_a_problem_is_reported():
    """An architecture with next to no shared memory, and a name that is none."""
    code = """
from vdcore_bench import aot
aot._SHARED = {"sm_90": 16}
aot.CALLS = {name: aot.CALLS[name] for name in ("T 16, 16 x 72",)}
print(sum("shared memory" in (r.problem or "") for r in aot.compile_report(["sm_90"], few=True)))
try:
    aot.compile_report(["sm_9000"])
except ValueError as error:
    print(error)
"""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    count, error = done.stdout.splitlines()[-2:]
    assert int(count) > 0 and "sm_9000" in error
