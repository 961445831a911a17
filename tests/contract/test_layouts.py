"""Hazards 4, 6, 7, 25: strides other than the contiguous ones, in every input and in the incoming gradients."""

import pytest
import torch
from support import FAST, HALF, check, dtype_of, on_backends, skip_unless_runs

import vdcore
from vdcore.testing import LAYOUTS, cases_of, run

# torch's products sum in another order where rows are padded: these two are held to the rule, all others to their bits.
TORCH = ("reference", "sdpa")


def check_layouts(case, backend, dtype, layouts):
    """The contiguous result, whatever the layout: its numbers are judged in test_cases.py."""

    def results(layout):
        inputs = skip_unless_runs(case, backend, dtype, requires_grad=True, layout=layout)
        return run(inputs, getattr(vdcore, case.op), layout=layout, backend=backend).named()

    contiguous = results("contiguous")
    for layout in layouts:
        different = [name for name, x in results(layout).items() if not torch.equal(x, contiguous[name])]
        assert not different, f"{case} on {backend} in {dtype}: {layout} changes {different}"


@on_backends(cases_of(tag="layout"), FAST)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_layout(case, backend, layout):
    if backend in TORCH:
        skip_unless_runs(case, backend, torch.float32, requires_grad=True)
        check(case, backend, layout=layout)
    else:
        for dtype in (torch.float32, torch.bfloat16):
            check_layouts(case, backend, dtype, [layout])


@on_backends(cases_of(tag="plain"), ["triton", "cuda"])
def test_layouts_interpreted(case, backend):
    check_layouts(case, backend, dtype_of(backend), ["innermost_apart", "heads_first", "packed"])


@on_backends(cases_of(tag="plain"))
def test_expanded_gradient(case, backend):
    """sum().backward() sends a gradient whose strides are all 0."""
    function = getattr(vdcore, case.op)
    grads = []
    for name in (backend, "reference"):
        inputs = skip_unless_runs(case, backend, dtype_of(backend), requires_grad=True)
        result = function(**inputs.args, backend=name)
        for y in result if isinstance(result, tuple) else (result,):
            y.sum().backward(retain_graph=True)
        grads.append([x.grad for x in inputs.leaves.values()])
    near = 3e-2 if dtype_of(backend) in HALF else 1e-4
    for ours, expected in zip(*grads):
        torch.testing.assert_close(ours, expected, rtol=near, atol=near)


@on_backends(cases_of(tag="plain"))
def test_results_are_contiguous(case, backend):
    inputs = skip_unless_runs(case, backend, dtype_of(backend), requires_grad=True, layout="heads_first")
    result = getattr(vdcore, case.op)(**inputs.args, backend=backend)
    outputs = result if isinstance(result, tuple) else (result,)
    assert all(y.is_contiguous() for y in outputs)
    sum(y.square().sum() for y in outputs).backward()
    assert all(x.grad is not None for x in inputs.leaves.values())


def test_views_whose_memory_holds_the_negative():
    """The imaginary part of a conjugate: DLPack has no flag for it."""
    x = torch.randn(1, 4, 3, 2, 1, dtype=torch.cfloat).conj().imag
    assert x.is_neg()
    plain = x.resolve_neg()
    assert torch.equal(vdcore.temporal_attention(x, x, x), vdcore.temporal_attention(plain, plain, plain))
    x, plain = x[..., 0], plain[..., 0]
    gate = torch.ones(1, 2)
    assert torch.equal(vdcore.gate_residual(x, x, gate), vdcore.gate_residual(plain, plain, gate))
