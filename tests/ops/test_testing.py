"""The kit that judges everything else is judged here: it must see what is wrong."""

import math

import pytest
import torch

from vdcore.testing import CASES, LAYOUTS, cases_of, error_ratio, lay_out, ulp
from vdcore.testing.torch_forms import TORCH_FORMS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 2, 5)])
def test_layouts_keep_the_values(layout, shape):
    x = torch.randn(shape)
    assert torch.equal(lay_out(x, layout), x)


def test_layouts_differ():
    x = torch.randn(2, 3, 4, 2, 5)
    strides = {lay_out(x, name).stride() for name in LAYOUTS}
    assert len(strides) >= len(LAYOUTS) - 1
    assert lay_out(x, "innermost_apart").stride(-1) != 1


def test_ulp():
    assert ulp(1.0, torch.float32) == 2**-23 and ulp(1.5, torch.bfloat16) == 2**-7 and ulp(4.0, torch.float16) == 2**-8


def test_ratio_accepts_rounding_and_sees_more():
    exact = torch.randn(1000, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    assert error_ratio(rounded, exact, [rounded]).worst < 1
    assert error_ratio(rounded * 1.05, exact, [rounded]).worst > 1
    one_off = rounded.clone()
    one_off[17] += 0.25
    assert error_ratio(one_off, exact, [rounded]).maximum > 1
    drift = rounded + 0.06
    assert error_ratio(drift, exact, [rounded]).rms > 1


def test_the_more_exact_form_counts():
    exact = torch.randn(1000, dtype=torch.float64)
    good, bad = exact.float(), exact.float() + 1e-3
    assert error_ratio(bad, exact, [bad]).worst < 1 < error_ratio(bad, exact, [bad, good]).worst


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_ratio_sees_nan_and_infinity(value):
    exact = torch.randn(10, dtype=torch.float64)
    ours = exact.float()
    ours[3] = value
    assert error_ratio(ours, exact, [exact.float()]).worst == math.inf
    exact[3] = value
    assert error_ratio(ours, exact, [exact.float()]).worst < 1


def test_every_operator_has_cases_and_a_torch_form():
    ops = {case.op for case in CASES}
    assert ops == set(TORCH_FORMS) and all(cases_of(op, tag="plain") for op in ops)
    names = [str(case) for case in CASES]
    assert len(names) == len(set(names))
