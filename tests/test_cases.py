"""Numbers: every case of every operator on every backend against the float64 reference.

Interpreted and emulated kernels are slow: every case in one dtype, every dtype with one case per operator.
"""

import pytest
import torch
from support import DTYPES, FAST, backends_of, check, dtypes_of, run_python, skip_unless_runs, tier_of

from vdcore.testing import CASES, of_leaves


def dtypes_for(case, backend, number):
    if backend in FAST:
        return DTYPES
    dtypes = dtypes_of(backend)
    if "plain" in case.tags:
        return (*dtypes, torch.float16) if backend == "triton" else dtypes
    return (dtypes[number % len(dtypes)],)


TRIALS = [
    pytest.param(case, backend, dtype, marks=tier_of(case, backend))
    for number, case in enumerate(CASES)
    for backend in backends_of(case.op)
    for dtype in dtypes_for(case, backend, number)
]


@pytest.mark.parametrize("case,backend,dtype", TRIALS, ids=lambda x: str(x).removeprefix("torch."))
def test_case(case, backend, dtype):
    skip_unless_runs(case, backend, dtype, requires_grad=True)
    check(case, backend, dtype)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512-bf16", "amx"])
def test_every_instruction_set_of_this_machine(isa):
    """The same source compiled for another instruction set obeys the same rule."""
    code = """
import torch
from vdcore.ops.native import native
try:
    native().cpu_isa()
except ValueError as error:
    print("skip", error)
    raise SystemExit
import vdcore
from vdcore.testing import CASES, check
for case in CASES:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dict(vdcore.explain(case.op, **case.inputs(dtype, requires_grad=True).args))["cpu"] is None:
            check(case, "cpu", dtype)
print("ran on", native().cpu_isa())
"""
    said = run_python(code, VDCORE_CPU_ISA=isa).strip()
    if said.startswith("skip"):
        pytest.skip(said)
    assert said == f"ran on {isa}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_leaves_of_every_case_can_be_others(case):
    """What tangents and the sanitizers' run do, whatever values the arguments are of."""
    inputs = case.inputs(torch.float32)
    taken = []
    call = of_leaves(inputs, lambda **args: taken.append(args) or torch.zeros(1))
    call(*inputs.leaves.values())
    assert taken[0].keys() == inputs.args.keys()
    masks = ("mask", "tiles")
    assert all(str(taken[0][name]) == str(inputs.args[name]) for name in masks if name in inputs.args)
