"""What training needs of the model: checkpointing that keeps attention, compilation, autocast."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from vdits import MASKS, config, inputs, model_of

import vdcore
from vdcore.models import VDiT
from vdcore.models.config import ATTENTION

GIVEN = [
    config(attention=a, mask=MASKS[2], position="rope" if i % 2 else "sincos", qk_norm=True, gate="token")
    for i, a in enumerate(ATTENTION)
]


def each(test):
    return pytest.mark.parametrize("given", GIVEN, ids=lambda given: given.attention)(test)


def step(model, call=None):
    """Output, gradients, and attention operators that ran, by name and direction."""
    torch.manual_seed(1)
    video, timestep, keywords = inputs(per_frame=True)
    model.zero_grad()
    before = vdcore.calls()
    out = (model if call is None else call)(video, timestep, **keywords)
    out.float().square().mean().backward()
    ran = Counter()
    for (op, _, direction), n in (vdcore.calls() - before).items():
        if op.endswith("attention"):
            ran[op, direction] += n
    return out.detach(), [p.grad for p in model.parameters()], ran


@each
def test_checkpointing_changes_nothing_and_computes_attention_once(given):
    model = model_of(given)
    checkpointed = VDiT(replace(given, checkpoint=True))
    checkpointed.load_state_dict(model.state_dict())
    expected, expected_gradients, ran = step(model)
    out, gradients, ran_checkpointed = step(checkpointed)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients))
    assert ran_checkpointed == ran
    assert all(ran[op, "fwd"] == ran[op, "bwd"] for op, _ in ran)


def test_plain_checkpointing_would_compute_attention_twice():
    """The count above can fail."""
    from torch.utils.checkpoint import checkpoint

    model = model_of(config())
    model.run = lambda i, x, context, cache: checkpoint(model.blocks[i], x, context, use_reentrant=False)
    *_, ran = step(model)
    assert ran["temporal_attention", "fwd"] == 2 * ran["temporal_attention", "bwd"] == 4


def test_checkpointing_keeps_less():
    """Bytes that autograd saves, from the blocks' projections down to attention's results and the blocks' inputs."""

    def kept(given):
        model, sizes = model_of(given), {}

        def save(x):
            if not isinstance(x, torch.nn.Parameter):
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        video, timestep, keywords = inputs()
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            out = model(video, timestep, **keywords)
        return sum(sizes.values()), out

    whole, _ = kept(config(depth=4))
    less, _ = kept(config(depth=4, checkpoint=True))
    assert less < whole / 2


def same_when_compiled(given, backend):
    model = model_of(given)
    expected, expected_gradients, ran = step(model)
    torch._dynamo.reset()
    out, gradients, ran_compiled = step(model, torch.compile(model, fullgraph=True, backend=backend))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients, expected_gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert ran_compiled == ran


@each
def test_compiled_in_one_graph(given):
    same_when_compiled(replace(given, depth=2 if given.attention == "alternating" else 1), "eager")


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_and_checkpointed(backend):
    same_when_compiled(replace(GIVEN[1], depth=1, checkpoint=True), backend)


@each
def test_autocast_and_half_precision(given):
    """bfloat16 keeps 8 bits: outputs of size 1 are right to a few hundredths after two blocks."""
    model = model_of(given)
    expected, expected_gradients, _ = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients, _ = step(model)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.05 * expected.norm()
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (gradients, expected_gradients))
    assert (a - b).norm() < 0.1 * b.norm()
    torch.manual_seed(1)
    video, timestep, keywords = inputs(per_frame=True)
    model.bfloat16()
    out = model(video.bfloat16(), timestep, **{**keywords, "text": keywords["text"].bfloat16()})
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.05 * expected.norm()
