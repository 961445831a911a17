"""Whoever watches operators sees ours, also where nothing needs a gradient and the backend could be called at once."""

import contextlib

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import vdcore
from vdcore.testing import CASES

FIRST = {case.op: case for case in reversed(CASES)}


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=list(FIRST))
def call(request):
    case = FIRST[request.param]
    arguments = case.inputs(torch.float32).args
    return request.param, lambda: getattr(vdcore, request.param)(**arguments)


def test_a_dispatch_mode(call):
    name, run = call
    with torch.no_grad(), Watch() as watch:
        run()
    assert any(name in seen for seen in watch.seen)


def test_the_profiler(call):
    name, run = call
    with torch.no_grad(), torch.profiler.profile() as profile:
        run()
    assert any(event.key == f"vdcore::{name}" for event in profile.key_averages())


def test_a_tracer():
    q = torch.randn(1, 3, 2, 3, 1, 8)
    with torch.no_grad():
        graph = make_fx(lambda q: vdcore.temporal_attention(q))(q)
    assert any("temporal_attention" in str(node.target) for node in graph.graph.nodes)


def test_fake_and_meta_tensors():
    q = torch.empty(1, 3, 2, 3, 1, 8, device="meta")
    assert vdcore.temporal_attention(q).device.type == "meta"
    with torch._subclasses.FakeTensorMode():
        assert vdcore.temporal_attention(torch.empty(1, 3, 2, 3, 1, 8)).shape == (1, 3, 2, 1, 8)


def test_same_bits_whoever_watches(call):
    _, run = call
    with torch.no_grad():
        alone = run()
        with Watch():
            watched = run()
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (alone, watched))):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def gradients(name, watch=None):
    case = FIRST[name]
    inputs = case.inputs(torch.float32, requires_grad=True)
    with watch or contextlib.nullcontext():
        outputs = getattr(vdcore, name)(**inputs.args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [x for x in inputs.leaves.values() if x.requires_grad]
        return torch.autograd.grad([y.float().nan_to_num().square().sum() for y in outputs], leaves, allow_unused=True)


@pytest.mark.parametrize("name", FIRST)
def test_same_gradients_whoever_watches(name):
    watch = Watch()
    for alone, watched in zip(gradients(name), gradients(name, watch), strict=True):
        assert (alone is None and watched is None) or torch.equal(alone, watched)
    assert any(f"{name}_backward" in seen for seen in watch.seen)


def test_a_backward_that_alone_is_watched():
    q = torch.randn(1, 3, 2, 3, 1, 8, requires_grad=True)
    out = vdcore.temporal_attention(q)
    with Watch() as watch:
        (watched,) = torch.autograd.grad(out.sum(), q)
    assert any("temporal_attention_backward" in seen for seen in watch.seen)
    assert torch.equal(watched, torch.autograd.grad(vdcore.temporal_attention(q).sum(), q)[0])


def test_hooks_see_what_is_saved():
    """Offloading and activation checkpointing live by them."""
    packed = []
    q = torch.randn(1, 3, 2, 3, 1, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x):
        out = vdcore.temporal_attention(q)
    assert q.shape in packed and out.shape in packed
    out.sum().backward()
    assert q.grad is not None


def test_a_tensor_that_was_changed_since():
    q = torch.randn(1, 3, 2, 3, 1, 8, requires_grad=True)
    x = q * 1
    out = vdcore.temporal_attention(x)
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
