"""Teacher forcing in one pass is training on every prefix by itself: outputs and gradients."""

import pytest
import torch
from support import backends_of
from vdits import config, doubled, in_plain_torch, inputs, model_of, to_double

import vdcore
from vdcore import FrameMask
from vdcore.testing import error_ratio

CHUNKS = {
    "factorized": FrameMask(future=0, chunk=2),
    "full": FrameMask(past=1, future=0, chunk=2),
    "gated": FrameMask(past=1, future=0),
    "alternating": FrameMask(future=0, chunk=4),
}


def by_prefix(model, video, timestep, history, **keywords):
    """Each chunk after the clean ones before it, in a pass of its own."""
    chunk, parts = model.config.mask.chunk, []
    for start in range(0, video.shape[2], chunk):
        own = slice(start, start + chunk)
        prefix = torch.cat((history[:, :, :start], video[:, :, own]), 2)
        times = torch.cat((torch.zeros_like(timestep[:, :start]), timestep[:, own]), 1)
        parts.append(model(prefix, times, **keywords)[:, :, start:])
    return torch.cat(parts, 2)


def at_once(model, video, timestep, history, **keywords):
    return model(video, timestep, history=history, **keywords)


def run(function, model, given, keywords):
    """The result, and the gradients of video, history and weights, of a loss that weighs every value differently."""
    video, timestep, history = given
    leaves = [x.detach().requires_grad_() for x in (video, history)]
    out = function(model, leaves[0], timestep, leaves[1], **keywords)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    parameters = list(model.parameters())
    grads = torch.autograd.grad((weight * out**2).sum(), [*leaves, *parameters], allow_unused=True)
    return out.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip((*leaves, *parameters), grads)]


def drawn(attention, frames=6):
    given = config(attention=attention, mask=CHUNKS[attention], position="rope", qk_norm=True, depth=2)
    video, timestep, keywords = inputs((1, 3, frames, 4, 4), per_frame=True, given=given)
    return model_of(given), (video, timestep, torch.randn_like(video)), keywords


@pytest.mark.parametrize("attention", CHUNKS)
def test_equal_to_every_prefix_by_itself(attention):
    """In float64, where nothing but the order of sums differs."""
    model, given, keywords = drawn(attention)
    exact = doubled(model)
    given, keywords = [to_double(x) for x in given], {name: to_double(x) for name, x in keywords.items()}
    torch.testing.assert_close(run(at_once, exact, given, keywords), run(by_prefix, exact, given, keywords))


@pytest.mark.parametrize(
    "attention, backend",
    [
        *((a, "cpu") for a in CHUNKS),
        *((a, "triton") for a in ("factorized", "full") if "triton" in backends_of("patchify")),
    ],
)
def test_on_backends(attention, backend):
    """One pass on a backend against prefixes in float64, by the tolerance rule; gradients all together, because PyTorch
    is lucky with a scalar now and then."""
    model, given, keywords = drawn(attention, frames=4)
    exact, gradients = run(
        by_prefix, doubled(model), [to_double(x) for x in given], {name: to_double(x) for name, x in keywords.items()}
    )
    plain = []
    for name in ("naive", "sdpa"):
        with in_plain_torch(name):
            plain.append(run(by_prefix, model, given, keywords))
    with vdcore.use_backend(backend):
        out, found = run(at_once, model, given, keywords)
    assert error_ratio(out, exact, [p[0] for p in plain]).worst <= 1
    flat = [torch.cat([g.flatten() for g in grads]) for grads in (found, gradients, *(p[1] for p in plain))]
    assert error_ratio(flat[0], flat[1], flat[2:], gradient=True).worst <= 1


def test_the_history_of_later_chunks_is_never_seen():
    model, (video, timestep, history), keywords = drawn("full")
    changed = history.clone()
    changed[:, :, 2:] += 1
    first, second = (at_once(model, video, timestep, h, **keywords) for h in (history, changed))
    assert torch.equal(first[:, :, :4], second[:, :, :4]), "the second chunk sees the first one's history"
    assert not torch.equal(first[:, :, 4:], second[:, :, 4:])
    changed = history.clone()
    changed[:, :, 4:] += 1
    assert torch.equal(first, at_once(model, video, timestep, changed, **keywords)), "the last chunk is of no use"


def test_a_text_and_a_timestep_for_every_frame_or_for_all():
    model, (video, timestep, history), keywords = drawn("factorized")
    one = timestep[:, :1].expand_as(timestep)
    per_frame = {**keywords, "text": keywords["text"][:, None].expand(-1, 6, -1, -1)}
    per_frame["text_lengths"] = keywords["text_lengths"][:, None].expand(-1, 6)
    whole = at_once(model, video, one[:, 0], history, **keywords)
    torch.testing.assert_close(at_once(model, video, one, history, **per_frame), whole)
    elsewhere = at_once(model, video, one, history, history_timestep=timestep[:, 0] + 500, **keywords)
    assert not torch.equal(elsewhere[:, :, 2:], whole[:, :, 2:])


@pytest.mark.parametrize(
    "mask", [FrameMask(), FrameMask(past=1, future=0, sink=1), FrameMask(past=1, future=0, shots=(0, 2))], ids=str
)
def test_masks_that_no_chunk_can_follow(mask):
    model = model_of(config(mask=mask, text_width=None, classes=None))
    video = torch.randn(1, 3, 4, 4, 4)
    with pytest.raises(ValueError, match="VDiT: history must be None where the mask is not causal by chunks"):
        model(video, torch.zeros(1), history=video)


def test_what_does_not_fit():
    model, (video, timestep, history), keywords = drawn("factorized")
    with pytest.raises(ValueError, match="VDiT: history must be of the video's shape"):
        model(video, timestep, history=history[:, :, 1:], **keywords)
    with pytest.raises(ValueError, match=r"VDiT: history_timestep must be \(B,\)"):
        model(video, timestep, history=history, history_timestep=timestep, **keywords)
    with pytest.raises(ValueError, match="VDiT: history must be None with a cache, a control or a mesh"):
        model(video, timestep, history=history, control=[], **keywords)
