"""Every case of every operator on the GPU, in half precisions and float32, by the tolerance rule."""

import pytest
import torch
from support import skip_unless_runs

import vdcore
from vdcore.testing import CASES, LAYOUTS, cases_of, check

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype):
    skip_unless_runs(case, "triton", dtype, device="cuda", requires_grad=True)
    check(case, "triton", dtype, device="cuda")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("case", cases_of(tag="layout"), ids=str)
def test_layout(case, layout):
    check(case, "triton", torch.bfloat16, device="cuda", layout=layout)


@pytest.mark.parametrize("D", [8, 40, 59, 64, 72, 80, 96, 104, 111, 128, 160, 256])
@pytest.mark.parametrize("op", ["temporal_attention", "spatial_attention"])
def test_head_dim_against_float32(op, D):
    """Shapes of models, too large for the reference: half precision against float32 on the same values."""
    shape = (1, 16, 96, 4, D) if op == "temporal_attention" else (1, 2, 517, 4, D)
    qkv = [torch.randn(shape, device="cuda").bfloat16() for _ in range(3)]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        out = getattr(vdcore, op)(*leaves, backend="triton" if dtype == torch.bfloat16 else "reference")
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for ours, exact in zip(*results):
        error = (ours.float() - exact.float()).norm() / exact.float().norm()
        assert error < 1e-2, error
