"""The CUDA kernels under their emulator: every case, and shapes around the edges of their tiles."""

import pytest
import torch
from support import HALF

import vdcore
from vdcore.backends import BACKENDS
from vdcore.testing import cases_of, check

cuda = BACKENDS["cuda"]
pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=f"cuda: {cuda.missing()}")


def check_what_runs(case, dtype, **kwargs):
    """Forward, and backward where there is one; a skip with the reason where the call is not served."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for gradients in (True, False):
        inputs = case.inputs(dtype, requires_grad=gradients, device=device, layout=kwargs.get("layout", "contiguous"))
        reason = dict(vdcore.explain(case.op, **inputs.args))["cuda"]
        if reason is None:
            return check(case, "cuda", dtype, gradients=gradients, device=device, **kwargs)
    pytest.skip(reason)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [c for op in cuda.operators for c in cases_of(op)], ids=str)
def test_case(case, dtype):
    check_what_runs(case, dtype)
