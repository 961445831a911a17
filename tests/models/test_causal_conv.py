"""Convolutions that come in pieces, and the autoencoder made of them."""

import pytest
import torch

from vdcore.models import AutoencoderConfig, CausalAutoencoder, CausalConv3d
from vdcore.testing import error_ratio

CAUSAL = AutoencoderConfig(widths=(8, 12, 16))
LOOKS_AHEAD = AutoencoderConfig(widths=(8, 12, 16), causal=False)


@pytest.mark.parametrize("kernel", (3, (5, 1, 3)))
@pytest.mark.parametrize("stride", (1, 2, (2, 1, 1), (3, 2, 2)))
@torch.no_grad()
def test_any_chunks_give_the_whole(kernel, stride):
    conv = CausalConv3d(3, 4, kernel, stride)
    x = torch.randn(2, 3, 13, 6, 8)
    exact = conv.double()(x.double())
    whole = conv.float()(x)
    for sizes in ([1, 4, 4, 4], [13], [1] * 13, [2, 5, 1, 5]):
        stream = {}
        chunks = torch.cat([conv(piece, stream) for piece in x.split(sizes, 2)], 2)
        assert chunks.shape == whole.shape
        assert error_ratio(chunks, exact, [whole]).worst <= 1


def test_causal():
    """No result depends on a later frame; the first depends on the first frame alone."""
    conv = CausalConv3d(1, 1, stride=(2, 1, 1))
    x = torch.randn(1, 1, 9, 4, 4, requires_grad=True)
    y = conv(x)
    assert y.shape[2] == 5
    for t in range(5):
        (seen,) = torch.autograd.grad(y[:, :, t].sum(), x, retain_graph=True)
        frames = seen.abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist()
        assert frames == list(range(max(2 * t - 2, 0), 2 * t + 1))


def test_frames_before_the_first_are_copies_of_it():
    conv = CausalConv3d(2, 3)
    x = torch.randn(1, 2, 4, 5, 5)
    padded = torch.cat((x[:, :, :1], x[:, :, :1], x), 2)
    expected = torch.nn.functional.conv3d(padded, conv.conv.weight, conv.conv.bias, padding=(0, 1, 1))
    torch.testing.assert_close(conv(x), expected)


@torch.no_grad()
def in_chunks(model, video, chunk):
    latent = model.encode(video, chunk=chunk)
    return latent, model.decode(latent, chunk=max(chunk // model.config.factor, 1))


@pytest.mark.parametrize("chunk", (4, 8, 12))
@torch.no_grad()
def test_autoencoder_in_chunks(chunk):
    model, video = CausalAutoencoder(CAUSAL), torch.randn(2, 3, 17, 8, 12)
    latent = model.encode(video)
    decoded = model.decode(latent)
    assert latent.shape == (2, 4, 5, 2, 3)
    assert decoded.shape == video.shape
    found = in_chunks(model, video, chunk)
    model.double()
    exact = model.encode(video.double())
    assert error_ratio(found[0], exact, [latent]).worst <= 1
    exact = model.decode(found[0].double())
    plain = model.float().decode(found[0])
    assert error_ratio(found[1], exact, [plain]).worst <= 1


@torch.no_grad()
def test_streams_of_calls():
    """A call after the other, with dicts that remember; what stays is a few frames, not the clip."""
    model, video = CausalAutoencoder(CAUSAL), torch.randn(1, 3, 21, 8, 8)
    encoder, decoder, latents, frames = {}, {}, [], []
    kept = set()
    for piece in video.split([5, 4, 12], 2):
        latents.append(model.encode(piece, stream=encoder))
        frames.append(model.decode(latents[-1], stream=decoder))
        held = [x for s in (encoder, decoder) for x in s.values() if isinstance(x, torch.Tensor)]
        kept.add(sum(x.untyped_storage().nbytes() for x in held))
    whole = model.encode(video)
    torch.testing.assert_close(torch.cat(latents, 2), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(frames, 2), model.decode(whole), rtol=1e-4, atol=1e-5)
    assert len(kept) == 1


@torch.no_grad()
def test_no_seam_where_the_other_form_has_one():
    """Chunked against whole, latent frame by latent frame: a seam is at the border and fades away from it."""
    video = torch.randn(1, 3, 65, 8, 8)
    causal, ahead = (CausalAutoencoder(AutoencoderConfig(widths=(8, 12), causal=c)) for c in (True, False))
    ahead.load_state_dict(causal.state_dict())
    errors = {}
    for model in (causal, ahead):
        whole = model.encode(video)
        chunked = model.encode(video, chunk=32)  # latent frames 0, 1..16, 17..32
        errors[model] = ((chunked - whole).square().mean((0, 1, 3, 4)) / whole.square().mean()).sqrt()
    assert errors[causal].max() < 1e-5
    assert errors[ahead][16:18].min() > 0.1
    assert errors[ahead][8:10].max() < 1e-5  # five latent frames and more from the borders at 1 and 17


def test_the_future_is_not_in_the_latent():
    model = CausalAutoencoder(CAUSAL)
    video = torch.randn(1, 3, 13, 8, 8, requires_grad=True)
    latent = model.encode(video)
    for k in range(4):
        (seen,) = torch.autograd.grad(latent[:, :, k].sum(), video, retain_graph=True)
        assert not seen[:, :, 4 * k + 1 :].any()
    one = model.encode(video[:, :, :1])
    torch.testing.assert_close(one, latent[:, :, :1], rtol=1e-4, atol=1e-5)


def test_it_learns():
    model, clip = CausalAutoencoder(CAUSAL), torch.rand(1, 3, 1, 8, 8).expand(-1, -1, 5, -1, -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = (model(clip) - clip).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda m: m.encode(torch.zeros(1, 3, 8, 8, 8)), r"video must have 1 \+ a multiple of 4 frames, got 8"),
        (lambda m: m.encode(torch.zeros(1, 3, 5, 8, 6)), "the width of video must be a multiple of 4, got 6"),
        (lambda m: m.encode(torch.zeros(1, 4, 5, 8, 8)), r"video must be \(B, 3, T, H, W\) with T > 0"),
        (lambda m: m.encode(torch.zeros(1, 3, 5, 8, 8), chunk=6), "chunk must be a multiple of 4 frames, got 6"),
        (lambda m: m.decode(torch.zeros(1, 4, 0, 2, 2)), "latent must be"),
        (lambda m: m.decode(torch.zeros(1, 4, 2, 2, 2), chunk=0), "chunk must be at least 1 frame, got 0"),
        (lambda m: CausalConv3d(1, 1, 2), "kernel must be odd"),
        (lambda m: CausalConv3d(1, 1, 1, 2), "kernel must have at least stride = 2 frames"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(CausalAutoencoder(CAUSAL))


def test_a_stream_that_has_begun_takes_whole_groups():
    model, stream = CausalAutoencoder(CAUSAL), {}
    model.encode(torch.zeros(1, 3, 1, 8, 8), stream=stream)
    with pytest.raises(ValueError, match="video must have a multiple of 4 frames, got 5"):
        model.encode(torch.zeros(1, 3, 5, 8, 8), stream=stream)
