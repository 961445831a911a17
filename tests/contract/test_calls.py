"""A call comes apart into tensors and numbers, and back, and is captured without being run."""

import pytest
import torch

import vdcore
from vdcore.ops.operator import capture
from vdcore.testing import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_there_and_back(case):
    call = capture(getattr(vdcore, case.op), **case.inputs(requires_grad=True).args)
    tensors, numbers = call.tensors(), call.numbers()
    assert len(tensors) == len(call.NAMES) and len(tensors) + len(numbers) == len(call.SCHEMA) and call.grad
    again = type(call).build(tensors, numbers, call.grad)
    assert type(again) is type(call) and again.grad and again.numbers() == numbers
    assert all(a is b for a, b in zip(again.tensors(), tensors, strict=True))


def test_capturing_runs_nothing_and_ends():
    q = torch.randn(1, 2, 3, 1, 8)
    before = vdcore.calls()
    call = capture(vdcore.temporal_attention, q, q, q, return_lse=True)
    assert call.return_lse and not call.grad and vdcore.calls() == before
    with pytest.raises(ValueError, match="q must be"):
        capture(vdcore.temporal_attention, q[0], q, q)
    with pytest.raises(TypeError, match="makes no call"):
        capture(torch.relu, q)
    assert vdcore.temporal_attention(q, q, q).shape == q.shape
