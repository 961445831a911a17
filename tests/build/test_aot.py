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


# Bytes a thread of what spills on sm_80, by kernel and call: more than 128 frames, float32, more than 128 channels.
SPILLS = {
    ("temporal_long_bwd_kv_kernel", "temporal_attention: T 120, 24 x 128"): 512,
    ("temporal_long_bwd_kv_kernel", "temporal_attention: T 240, 8 x 64"): 312,
    ("temporal_long_bwd_q_kernel", "temporal_attention: T 240, 8 x 64"): 24,
    ("temporal_long_bwd_q_kernel", "gated_attention: gated, 8 x 64, T 240"): 24,
    ("temporal_long_bwd_q_kernel", "temporal_attention: T 240, 8 x 64, causal"): 16,
    ("temporal_long_bwd_kv_kernel", "temporal_attention: T 240, 8 x 64, causal"): 8,
    ("temporal_long_bwd_kv_kernel", "temporal_attention: T 240, 8 x 64, teacher forcing"): 8,
    ("temporal_long_bwd_kv_kernel", "temporal_attention: T 240, 8 x 64, shots"): 16,
    ("frame_attention_fwd_kernel", "spatial_attention: S 1024, 8 x 160"): 8,
    ("frame_attention_bwd_q_kernel", "spatial_attention: S 256, 8 x 64, float32"): 8,
    ("frame_attention_fwd_kernel", "spatial_attention: S 256, 8 x 256, float32"): 8,
    ("frame_attention_bwd_q_kernel", "spatial_attention: S 256, 8 x 256, float32"): 16,
}


def test_every_call_on_ampere():
    records = compiled("report", "sm_80", "all")
    assert len(records) > 100
    wrong = [r for r in records if r["problem"] and not 0 < r["spills"] <= SPILLS.get((r["kernel"], r["call"]), 0)]
    assert not problems(wrong)


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
