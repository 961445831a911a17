"""What swapping means is the same for every host: the report, twice is once, back bit for bit, copies, all or none."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from stand_ins import MMSingleStreamBlock, Patcher, STDiT3Block, WanSelfAttention, optimized_attention
from torch import nn

import vdcore
from vdcore.integrations import comfyui, hunyuan_video, open_sora, swap, wan
from vdcore.integrations.report import Entry, Report

REPLACED = "its forward is replaced already"


@dataclass
class Host:
    """A host as its users meet it.

    Args:
        make: a model of at least two modules that are served; of ComfyUI a patcher.
        run: calls it.
        parts: the modules of a model, by which the test tells its state.
        spoil: makes one of them one that cannot be served, or a call one that cannot.
        reason: the words that then say why.
    """

    adapter: ModuleType
    make: Callable[[], Any]
    run: Callable[[Any], torch.Tensor]
    spoil: Callable[[Any], Any]
    reason: str = REPLACED


def modules_of(kind, **options):
    torch.manual_seed(0)
    return nn.ModuleList([kind(**options) for _ in range(2)]).eval()


def run_all(model, *given, **named):
    torch.manual_seed(1)
    x = torch.randn(2, 12, 16)
    with torch.no_grad():
        for module in model:
            x = module(x, *given, **named)
    return x


def replace_a_forward(model):
    module = list(model)[-1]
    module.forward = partial(type(module).forward, module)


def run_patched(patcher, **named):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 6, 24) for _ in range(3))
    return optimized_attention(q, k, v, 3, transformer_options=patcher.model_options["transformer_options"], **named)


def text_and_steps():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, 5, 16, generator=generator), torch.randn(2, 96, generator=generator)


HOSTS = {
    "wan": Host(
        wan,
        lambda: modules_of(WanSelfAttention),
        lambda model: run_all(model, torch.tensor([12, 7])),
        replace_a_forward,
    ),
    "hunyuan_video": Host(
        hunyuan_video,
        lambda: modules_of(MMSingleStreamBlock),
        lambda model: run_all(model, torch.tensor([0, 12, 12, 24, 24], dtype=torch.int32)),
        replace_a_forward,
    ),
    "open_sora": Host(
        open_sora,
        lambda: modules_of(STDiT3Block, temporal=True),
        lambda model: run_all(model, *text_and_steps(), T=3, S=4),
        replace_a_forward,
    ),
    "comfyui": Host(
        comfyui,
        lambda: Patcher({"transformer_options": {"other": 1}, "sampler": 2}),
        run_patched,
        lambda patcher: run_patched(patcher, mask=torch.randn(6, 6)),
        "an attention mask",
    ),
}


def diffusers_host():
    pytest.importorskip("diffusers")
    from host_runs import MODELS, run

    import vdcore.integrations.diffusers as adapter

    def spoil(model):
        attn = model.blocks[0].attn1
        attn.forward = partial(type(attn).forward, attn)

    return Host(adapter, MODELS["Wan"].model, lambda model: run(model, "Wan"), spoil)


@pytest.fixture(params=["diffusers", *HOSTS])
def host(request):
    return HOSTS[request.param] if request.param in HOSTS else diffusers_host()


def state(model):
    """All that a swap may touch, by identity where it can be."""
    if not isinstance(model, nn.Module):
        return model.model_options
    return [
        (type(m), m.__dict__.get("processor"), set(m.__dict__), list(m._forward_pre_hooks)) for m in model.modules()
    ]


def served_calls(call):
    before = vdcore.calls()
    out = call()
    return out, sum(n for (op, _, _), n in (vdcore.calls() - before).items() if op.endswith("attention"))


def test_the_report(host):
    model = host.make()
    want = host.run(model)
    report = host.adapter.swap_in(model)
    assert type(report) is Report and not report.left and report.served
    assert all(type(entry) is Entry and entry.name and entry.kind for entry in report.served)
    assert any("attention" in entry.what for entry in report.served)
    assert len({entry.name for entry in report.served}) == len(report.served)
    assert str(report).startswith(f"served: {len(report.served)}\n") and "left: 0" in str(report)
    ours, calls = served_calls(lambda: host.run(model))
    assert calls
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


def test_what_is_left_has_its_reason(host):
    model = host.make()
    if host.reason == REPLACED:
        host.spoil(model)
    report = host.adapter.swap_in(model)
    if host.reason != REPLACED:
        assert not report.left
        host.spoil(model)
    assert [host.reason in entry.what for entry in report.left] == [True]
    assert "left: 1\n" in str(report) and host.reason in str(report)
    assert report.served


def test_twice_is_once(host):
    model = host.make()
    first = host.adapter.swap_in(model)
    before = state(model)
    second = host.adapter.swap_in(model)
    assert state(model) == before
    assert (second.served, second.left) == (first.served, first.left)


def test_swap_out_is_bit_for_bit(host):
    model = host.make()
    before, want = copy.copy(state(model)), host.run(model)
    host.adapter.swap_out(model)  # was never swapped
    assert state(model) == before
    host.adapter.swap_in(model)
    assert state(model) != before
    for _ in range(2):
        host.adapter.swap_out(model)
        assert state(model) == before
    ours, calls = served_calls(lambda: host.run(model))
    assert torch.equal(ours, want) and not calls


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_swapped_and_swap_out(host, way):
    model = host.make()
    plain = host.run(model)
    host.adapter.swap_in(model)
    want = host.run(model)
    other = way(model)
    host.adapter.swap_out(model)
    ours, calls = served_calls(lambda: host.run(other))
    assert torch.equal(ours, want) and calls
    host.adapter.swap_out(other)
    ours, calls = served_calls(lambda: host.run(other))
    assert torch.equal(ours, plain) and not calls


@pytest.mark.parametrize("made", [False, True], ids=["before it is made", "after it is made"])
def test_an_error_on_the_way_undoes_all(host, made, monkeypatch):
    model = host.make()
    before, want, make, changes = copy.copy(state(model)), host.run(model), swap.Change.make, []
    monkeypatch.setattr(swap.Change, "make", lambda change: changes.append(change) or make(change))
    host.adapter.swap_in(model)
    host.adapter.swap_out(model)
    total, done = len(changes), []

    def fails(change):
        done.append(change)
        if made or len(done) < total:
            make(change)
        if len(done) == total:
            raise KeyboardInterrupt

    monkeypatch.setattr(swap.Change, "make", fails)
    with pytest.raises(KeyboardInterrupt):
        host.adapter.swap_in(model)
    assert len(done) == total and state(model) == before
    assert torch.equal(host.run(model), want)


@pytest.mark.parametrize("verb", ["swap_in", "swap_out"])
def test_what_is_no_model_is_refused(host, verb):
    with pytest.raises(TypeError, match=f"{verb}: model.* must be a .*, got object"):
        getattr(host.adapter, verb)(object())
