"""The kit that judges everything else is judged here: it must see what is wrong."""

import math

import pytest
import torch

import vdcore
from vdcore.testing import CASES, LAYOUTS, TORCH_FORMS, cases_of, draws, error_ratio, lay_out, pooled, run, ulp
from vdcore.testing.tolerance import Errors


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


def test_a_lucky_draw_of_torchs_fails_nobody():
    """One draw of four in which torch errs by next to nothing, and ours as always."""
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(4)]
    ours = [x + 1e-4 * torch.randn(1000, generator=generator) for x in exact]
    theirs = [x + 1e-4 * torch.randn(1000, generator=generator) for x in exact]
    theirs[2] = exact[2].clone()
    assert error_ratio(ours[2].float(), exact[2], [theirs[2]]).worst > 1
    assert error_ratio([x.float() for x in ours], exact, [theirs]).worst < 1
    assert pooled([Errors(1.0, 3.0, 2.0), Errors(3.0, 4.0, 1.0)]) == Errors(2.0, math.sqrt(12.5), 2.0)


def test_results_of_few_values_take_more_draws():
    scalar = next(case for case in cases_of("gated_attention") if "scalar gate" in case.name)
    assert len(draws(scalar)) == 16 and len(draws(cases_of("temporal_attention", tag="plain")[0])) == 4


def results(case, dtype, change):
    """Ratios by result's name, of torch's own results after ``change(name, result, inputs)``."""
    forms, ours, exact = [], {}, {}
    for seed in draws(case):
        inputs = case.inputs(dtype, seed=seed)
        wide = case.inputs(dtype, seed=seed, stored=torch.float64)
        for name, x in run(wide, getattr(vdcore, case.op), gradients=False, backend="reference").named().items():
            exact.setdefault(name, []).append(x)
        forms.append([run(inputs, f, gradients=False).named() for f in TORCH_FORMS[case.op].values()])
        for name, x in forms[-1][0].items():
            ours.setdefault(name, []).append(change(name, x.clone(), inputs))
    return {
        name: error_ratio(x, exact[name], [[draw[i][name] for draw in forms] for i in range(len(forms[0]))])
        for name, x in ours.items()
    }


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of(tag="plain"), ids=str)
def test_the_rule_sees_a_few_rows_that_are_off(case, dtype):
    """One percent of the rows, by 64 ulp of the result's scale."""

    def off(name, x, inputs):
        rows = x.reshape(-1, x.shape[-1])
        rows[:: max(min(100, len(rows)), 1)] += 64 * ulp(x.abs().max().item(), dtype)
        return rows.reshape(x.shape)

    assert all(r.worst < 1 for r in results(case, dtype, lambda name, x, inputs: x).values()), "torch itself passes"
    assert all(r.worst > 1 for r in results(case, dtype, off).values())


@pytest.mark.parametrize(
    "case,dtype",
    [(case, torch.float32) for case in cases_of("temporal_attention") if str(case).endswith(("-plain", "-long"))]
    + [(case, dtype) for case in cases_of("cross_attention", tag="plain") for dtype in DTYPES],
    ids=str,
)
def test_the_rule_sees_a_key_that_is_left_out(case, dtype):
    """Of one row of one head: the visible key that has the least weight in float32, any key in half precision."""

    def leave_out(name, x, inputs):
        q, k, v = (inputs.args[n].double() for n in "qkv")
        b, t, s, h = (n - 1 for n in q.shape[:4])
        keys = (k[b, :, h], v[b, :, h]) if k.ndim == 4 else (k[b, :, s, h], v[b, :, s, h])
        scores = keys[0] @ q[b, t, s, h] * q.shape[-1] ** -0.5
        if mask := inputs.args.get("mask"):
            scores[~mask.visible(q.shape[1])[t]] = -math.inf
        weights = scores.softmax(0)
        weights[weights.masked_fill(weights == 0, 2).argmin() if dtype == torch.float32 else 0] = 0
        x[b, t, s, h] = (weights / weights.sum()) @ keys[1]
        return x

    assert all(r.worst > 1 for r in results(case, dtype, leave_out).values())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_rule_sees_sums_in_half_precision(dtype):
    """Products of 203 keys, added up in the dtype of the inputs."""
    (case,) = cases_of("spatial_attention", tag="long")

    def summed(name, x, inputs):
        q, k, v = (inputs.args[n].transpose(2, 3).float() for n in "qkv")  # (B, T, H, S, D)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        total = torch.zeros_like(v, dtype=dtype)
        for j in range(v.shape[-2]):
            total += (weights[..., j, None] * v[..., j, None, :]).to(dtype)
        return total.transpose(2, 3)

    assert all(r.worst > 1 for r in results(case, dtype, summed).values())


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
