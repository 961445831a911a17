"""What people put into or around the modules of a swapped model keeps working."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from host_runs import MODELS, AttentionCalls, as_host, exact, gradients, run
from swapping import KINDS, swapped

from vdcore import FrameMask
from vdcore.integrations.diffusers import swap_in
from vdcore.testing import error_ratio


class LoRA(nn.Module):
    """A linear layer with a low-rank addition, as adapters put in its place."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, input):
        return self.base_layer(input) + self.up(self.down(input))


def add_lora(model):
    torch.manual_seed(5)
    for module in list(model.modules()):
        for name in ("to_q", "to_v", "proj_in", "proj_out"):
            child = getattr(module, name, None)
            if type(child) is nn.Linear and type(module).__name__ != "LatteTransformer3DModel":
                setattr(module, name, LoRA(child))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_added_layers_are_served(name, when):
    host = MODELS[name].model()
    add_lora(host)
    want = run(host, name)
    assert not torch.equal(want, as_host(name))
    model = MODELS[name].model()
    if when == "before":
        add_lora(model)
    swap_in(model)
    if when == "after":
        add_lora(model)
    with AttentionCalls() as calls:
        torch.testing.assert_close(run(model, name), want, rtol=1e-4, atol=1e-4)
    assert calls.served


@pytest.mark.parametrize("name", KINDS)
def test_fused_projections(name):
    host = MODELS[name].model()
    if not hasattr(host, "fuse_qkv_projections"):
        pytest.skip("this host fuses no projections")
    for when in ("before", "after"):
        model = MODELS[name].model()
        if when == "after":
            swap_in(model)
        try:
            model.fuse_qkv_projections()
        except (ValueError, RuntimeError) as error:
            pytest.skip(f"this host cannot: {error}")
        if when == "before":
            swap_in(model)
        torch.testing.assert_close(run(model, name), as_host(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_forward_hooks_run(name):
    """On blocks, attention and layers alike, as often as without the swap."""

    def count(model):
        seen = []
        for key, module in model.named_modules():
            if not isinstance(module, (nn.Dropout, nn.Identity)):
                module.register_forward_hook(lambda *_, key=key: seen.append(key))
        run(model, name)
        return seen

    host = set(count(MODELS[name].model()))
    model, _ = swapped(name)
    ours = set(count(model))
    assert host == ours


@pytest.mark.parametrize("name", KINDS)
def test_replaced_forwards_are_left(name):
    """Offloading and caching replace forward on the instance: what they do must not be lost."""
    model = MODELS[name].model()
    replaced = [m for m in model.modules() if hasattr(m, "processor") or "Block" in type(m).__name__]
    calls = []
    for module in replaced:
        forward = module.forward

        def counted(*args, forward=forward, **kwargs):
            calls.append(1)
            return forward(*args, **kwargs)

        module.forward = counted
    run(model, name)
    want = len(calls)
    report = swap_in(model)
    assert any("forward is replaced" in entry.what for entry in report.left)
    calls.clear()
    assert error_ratio(run(model, name), exact(name), [as_host(name)]).worst <= 1
    assert len(calls) == want


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing(name):
    model, _ = swapped(name)
    want = gradients(model, name)
    model.enable_gradient_checkpointing()
    model.train()
    got = gradients(model, name)
    for key, dx in want.items():
        if dx is not None:
            torch.testing.assert_close(got[key], dx, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["Wan", "Latte"])
def test_gradient_checkpointing_under_a_mask(name):
    model, _ = swapped(name, mask=FrameMask.causal())
    want = gradients(model, name)
    model.enable_gradient_checkpointing()
    model.train()
    got = gradients(model, name)
    for key, dx in want.items():
        if dx is not None:
            torch.testing.assert_close(got[key], dx, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["Latte", "Wan"])
def test_compile(name):
    model, _ = swapped(name)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, name), run(model, name), rtol=1e-4, atol=1e-4)


def test_compile_of_any_processor():
    """The copied function keeps its own names under torch.compile."""
    model, _ = swapped("SanaVideo")
    torch.compiler.reset()
    compiled = torch.compile(model.transformer_blocks[0].attn2, fullgraph=True, backend="aot_eager")
    x, text = torch.randn(2, 18, 24), torch.randn(2, 5, 24)
    with torch.no_grad(), AttentionCalls() as calls:
        out = compiled(x, text)
        torch.testing.assert_close(out, model.transformer_blocks[0].attn2(x, text), rtol=1e-4, atol=1e-4)
    assert calls.served >= 2 and not calls.torch


@pytest.mark.parametrize("name", KINDS)
def test_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        host = run(MODELS[name].model(), name)
        model, _ = swapped(name)
        with AttentionCalls() as calls:
            ours = run(model, name)
    assert calls.served
    assert error_ratio(ours.bfloat16(), exact(name), [host.bfloat16()]).worst <= 1
