"""What the tests share: which backend can be tried on which case here."""

import os
import subprocess
import sys

import pytest
import torch

import vdcore
from vdcore.ops.choose import BACKENDS
from vdcore.ops.cuda import emulated
from vdcore.testing import CASES
from vdcore.testing import check as check_all_draws

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)

# Interpreted kernels are slow: they run the cases, but not every sweep.
FAST = [name for name, b in BACKENDS.items() if name not in ("triton", "cuda") and b.missing() is None]


def backends_of(op, names=None):
    """Backends that have the operator, forward and backward, and can run on this machine's CPU."""
    return [
        name
        for name, backend in BACKENDS.items()
        if op in backend.operators
        and backend.operators[op].backward is not None
        and backend.missing() is None
        and (name != "cuda" or emulated())
        and (names is None or name in names)
    ]


def dtypes_of(backend):
    """What a backend is tried in where every dtype would take too long; the C++ engine is fast enough for all."""
    return {"cpu": DTYPES, "cuda": HALF}.get(backend, (torch.float32,))


def dtype_of(backend):
    """The dtype of a test that takes one."""
    return dtypes_of(backend)[0]


def check(case, backend, dtype=torch.float32, **kwargs):
    """The tolerance rule; interpreted kernels take one draw in four, against what PyTorch errs by over all of them."""
    return check_all_draws(case, backend, dtype, every=1 if backend in FAST else 4, **kwargs)


def tier_of(case, backend):
    """Marks of a case on a backend: windows and tiles take seconds where they are interpreted, and one of each does."""
    few = case.name in ("causal neighborhood against a cache", "ragged tiles, some see nothing")
    return [pytest.mark.slow] if backend == "triton" and "windows" in case.tags and not few else []


def on_backends(cases=None, names=None):
    """Decorator: parametrises over (case, backend) for every backend that has the case's operator."""
    pairs = [
        pytest.param(case, name, id=f"{case}-{name}", marks=tier_of(case, name))
        for case in (CASES if cases is None else cases)
        for name in backends_of(case.op, names)
    ]
    return pytest.mark.parametrize("case,backend", pairs)


def skip_unless_runs(case, backend, dtype, **kwargs):
    """The inputs of the case, or a skip that says why the backend does not run them."""
    inputs = case.inputs(dtype, **kwargs)
    reason = dict(vdcore.explain(case.op, **inputs.args))[backend]
    if reason is not None:
        pytest.skip(reason)
    return inputs


def run_python(code, *, timeout=300, **env):
    """Runs code in a fresh interpreter and returns what it printed."""
    full = {**os.environ, **{k: str(v) for k, v in env.items()}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=full)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
