"""Every video model of diffusers on vdcore: outputs, gradients, what is served, masks, and back again."""

import pytest
import torch

pytest.importorskip("diffusers")

from host_runs import (
    MODELS,
    AttentionCalls,
    DenseMask,
    L,
    T,
    as_host,
    exact,
    exact_gradients,
    gradients,
    run,
)

from vdcore import FrameMask
from vdcore.integrations.diffusers import swap_in, swap_out
from vdcore.integrations.diffusers.registry import GRIDS
from vdcore.testing import error_ratio

FACTORIZED = [name for name, tiny in MODELS.items() if tiny.factorized]
FRAMES_KNOWN = [name for name, tiny in MODELS.items() if tiny.factorized or type(tiny.build()) in GRIDS]
MASKED = [name for name in FRAMES_KNOWN if name != "SkyReelsV2 causal"]  # it has a mask of its own

# Calls that stay with the host, and why: (its class, words of the reason). SanaVideo's self-attention is linear.
LEFT = {
    "SanaVideo": {("Attention", "SanaLinearAttnProcessor3_0 calls no softmax attention")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_the_hosts(name, dtype):
    model = MODELS[name].model(dtype)
    swap_in(model)
    ratio = error_ratio(run(model, name, dtype), exact(name), [as_host(name, dtype)])
    assert ratio.worst <= 1, ratio


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_hosts(name):
    """Every tensor's gradient over its own largest value, all of them together."""
    model = MODELS[name].model()
    host = gradients(model, name)
    swap_in(model)
    ours, truth = gradients(model, name), exact_gradients(name)
    assert {key for key, dx in ours.items() if dx is None} == {key for key, dx in host.items() if dx is None}
    largest = max(dx.abs().max() for dx in truth.values() if dx is not None and dx.numel())
    columns = []
    for key, dx in truth.items():
        if dx is not None and host[key] is not None and dx.numel():
            # The gradient of a bias of keys is 0 but for rounding: it is measured against the others.
            scale = max(dx.abs().max(), 1e-6 * largest)
            columns.append([(x.double() / scale).flatten() for x in (ours[key], dx, host[key])])
    ours, truth, host = (torch.cat(column) for column in zip(*columns))
    ratio = error_ratio(ours.float(), truth, [host], gradient=True)
    assert ratio.worst <= 1, ratio


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_served(name):
    """100 % of spatial, temporal, full and cross attention; every other call has its reason."""
    model = MODELS[name].model()
    with AttentionCalls() as host:
        run(model, name)
    report = swap_in(model)
    with AttentionCalls() as ours:
        run(model, name)
    left = {(entry.kind, entry.what) for entry in report.left}
    expected = LEFT.get(name, set())
    assert len(left) == len(expected)
    assert all(any(kind == k and words in what for k, words in expected) for kind, what in left), left
    assert ours.served > 0
    calls = host.torch.total()
    if name == "Mochi":  # in each of two layers the host makes one call for each of two samples
        calls -= 2
    if name == "ConsisID":  # five perceivers of the face and one after each of two layers, by torch.softmax
        calls += 7
    assert ours.served + ours.torch.total() == calls
    # What torch still computes is among text tokens alone.
    assert all(n <= 2 * L for lengths in ours.torch for n in lengths), ours.torch


@pytest.mark.parametrize("name", MODELS)
def test_swap_out_is_bit_for_bit(name):
    model = MODELS[name].model()
    before = [(type(m), m.__dict__.get("processor"), set(m.__dict__)) for m in model.modules()]
    swap_in(model)
    run(model, name)
    swap_out(model)
    assert [(type(m), m.__dict__.get("processor"), set(m.__dict__)) for m in model.modules()] == before
    assert torch.equal(run(model, name), as_host(name))


MASKS = {"causal": FrameMask.causal(), "window": FrameMask.symmetric(1), "chunks": FrameMask(future=0, chunk=2)}
TEXT_FIRST = ("CogVideoX", "ConsisID", "EasyAnimate")
TOKENS = {"LTX": 72, "LTX2": 72, "LTX2.3": 72}
JOINT_TEXT = {"HunyuanVideo 1.5": L + 3 + 2}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", MASKED)
def test_mask_equals_the_dense_one(name, mask):
    tokens = None if MODELS[name].factorized else TOKENS.get(name, T * 6)
    sees = "text" if mask.future == 0 else "all"
    dense = DenseMask(mask, tokens, JOINT_TEXT.get(name, L), name in TEXT_FIRST, sees)
    with dense:
        host = run(MODELS[name].model(), name)
    assert dense.hits
    model = MODELS[name].model()
    swap_in(model, mask=mask)
    ours = run(model, name)
    assert not torch.equal(host, as_host(name))  # the mask does something
    torch.testing.assert_close(ours, host, rtol=2e-4, atol=2e-4)
    swap_out(model)
    assert torch.equal(run(model, name), as_host(name))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FRAMES_KNOWN])
def test_mask_is_refused_where_frames_are_unknown(name):
    with pytest.raises(ValueError, match="mask must be None for"):
        swap_in(MODELS[name].model(), mask=FrameMask.causal())


@pytest.mark.parametrize("name", FACTORIZED)
def test_frames_are_not_permuted(name):
    """All temporal attention runs on ``(B, T, S, C)``, also at run time."""
    model = MODELS[name].model()
    report = swap_in(model)
    assert not report.left_at_run_time()
    temporal = [entry for entry in report.served if "temporal_attention" in entry.what]
    host = MODELS[name].model()
    with AttentionCalls() as calls:
        run(host, name)
    frames = sum(n for (q, k), n in calls.torch.items() if q == k == T)
    assert frames > 0
    assert len(temporal) >= frames


def test_two_masks_are_one_too_many():
    model = MODELS["SkyReelsV2 causal"].model()
    swap_in(model, mask=FrameMask.causal())
    with pytest.raises(RuntimeError, match="attention cannot run under FrameMask"):
        run(model, "SkyReelsV2 causal")
