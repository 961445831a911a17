"""Launchers through Triton's real runtime, without a GPU: packing of arguments, kernels per shape, time of Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.compile(
        *("kernels/**/*.py", "bench/vdcore_bench/stub.py", "bench/vdcore_bench/aot.py", "vdcore/ops/**/*.py"),
        *("tests/build/stub_runs.py",),
        tools=["triton", "cc"],
    ),
    pytest.mark.timeout(1500),
]

SCRIPT = Path(__file__).with_name("stub_runs.py")


def on_the_stub(what, **env):
    env = {**os.environ, "TRITON_INTERPRET": "0", **env}
    done = subprocess.run([sys.executable, SCRIPT, what], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_is_launched_forward_and_backward():
    """The stub compares every parameter of every launch with its argument."""
    found = on_the_stub("launchers")
    assert not found["failed"] and not found["missing"]
    assert found["cases"] > 20 and found["launches"] > 60


def test_sizes_of_one_and_nothing_inside_of_tuples():
    found = on_the_stub("ones")
    assert len(found) > 20 and not {name: what for name, what in found.items() if what}


def test_a_parameter_in_the_wrong_place_is_an_error():
    assert "parameters are" in on_the_stub("packing")


def kernels(counts):
    return max(counts.values(), default=0)


def test_a_rollout_compiles_three_kernels_at_most():
    assert all(kernels(counts) <= 3 for counts in on_the_stub("rollout").values())


def test_sizes_compile_three_kernels_at_most():
    assert all(kernels(counts) <= 3 for counts in on_the_stub("sweeps").values())


def test_windows_and_lists_compile_a_kernel_for_each_configuration():
    """Not for each size, mask, grid, tile or list: lists have a second one where a tile's boxes are whole."""
    found = on_the_stub("windows")
    assert all(kernels(counts) <= 1 for counts in found.values()), found
    assert len(found["windows: frames and grids"]) == 4 and len(found["lists: frames and grids"]) >= 3


def test_what_is_compiled_ahead_is_what_runs(tmp_path):
    """Kernels of a call are in the cache that compiling ahead has filled; one of temporal attention's is not yet."""
    for op, (fresh, loaded) in on_the_stub("cache", TRITON_CACHE_DIR=str(tmp_path)).items():
        assert loaded > 1 and fresh <= (op == "temporal_attention"), op


def test_python_s_time_of_a_call_is_printed(capsys):
    found = on_the_stub("host")
    with capsys.disabled():
        print("\nmicroseconds of Python per call on the stub:", found)
    assert all(value > 0 for value in found.values())
