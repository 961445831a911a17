"""The rolling cache: what it keeps, and that it changes nothing but the time."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vdits import config, doubled, in_plain_torch, inputs, model_of, to_double

from vdcore import FrameMask
from vdcore.models.cache import FrameCache, slots_needed
from vdcore.testing import error_ratio

WINDOWS = [
    FrameMask(past=past, future=0, chunk=chunk, sink=sink)
    for past, chunk, sink in itertools.product((0, 1, 2, 5, None), (1, 2, 3), (0, 1, 2, 3, 7))
]


def bookkeeping(mask, chunks):
    """For every chunk: the frames that lie in the slots it sees, own ones included."""
    slots = slots_needed(mask, chunks * mask.chunk)
    cache, held, seen = FrameCache(mask, slots, 1, (1, 1), []), {}, []
    for c in range(chunks):
        place = cache.place(mask.chunk)
        for first, slot, n in place.runs:
            held |= {slot + i: c * mask.chunk + first + i for i in range(n)}
        seen.append(sorted(held[slot] for slot in range(place.visible)))
        cache.frames += mask.chunk
    assert max(held) < slots
    return seen


@pytest.mark.parametrize("mask", WINDOWS, ids=lambda m: f"past{m.past}-chunk{m.chunk}-sink{m.sink}")
def test_the_visible_slots_hold_the_visible_frames(mask):
    chunks = 12
    visible = mask.visible(chunks * mask.chunk)
    for c, frames in enumerate(bookkeeping(mask, chunks)):
        for t in range(c * mask.chunk, (c + 1) * mask.chunk):
            assert visible[t].nonzero().flatten().tolist() == frames


STREAMS = [
    ("factorized", FrameMask(past=1, future=0), "rope"),
    ("factorized", FrameMask(past=1, future=0, chunk=2, sink=3), "sincos"),
    ("alternating", FrameMask(past=2, future=0, chunk=2), "sincos+rope"),
    ("gated", FrameMask(past=1, future=0, chunk=3, sink=1), "rope"),
    ("full", FrameMask(past=1, future=0, chunk=2, sink=1), "rope"),
    ("full", FrameMask(past=None, future=0, chunk=2), "sincos"),
    ("spatial", FrameMask(past=0, future=0, chunk=2), "sincos"),
]


def stream(model, video, timestep, keywords, disturb=True):
    """The video chunk by chunk: noise is denoised in vain first, then the chunk is kept."""
    chunk = model.config.mask.chunk
    cache, results = model.new_cache(len(video), *video.shape[3:], frames=video.shape[2]), []
    for start in range(0, video.shape[2], chunk):
        own = slice(start, start + chunk)
        if disturb:
            model(torch.full_like(video[:, :, own], 100), timestep[:, own], cache=cache, **keywords)
        results.append(model(video[:, :, own], timestep[:, own], cache=cache, keep=True, **keywords))
    assert cache.frames == video.shape[2]
    return torch.cat(results, 2)


@pytest.mark.parametrize("attention,mask,position", STREAMS, ids=lambda x: x if isinstance(x, str) else "")
@torch.no_grad()
def test_a_stream_equals_full_recomputation(attention, mask, position):
    given = config(attention=attention, mask=mask, position=position, qk_norm=True, gate="head", kv_heads=1)
    model, (video, timestep, keywords) = model_of(given), inputs((2, 3, 12, 4, 6), per_frame=True)
    exact = doubled(model)(to_double(video), timestep, **{name: to_double(x) for name, x in keywords.items()})
    plain = []
    for name in ("naive", "sdpa"):
        with in_plain_torch(name):
            plain.append(model(video, timestep, **keywords))
    assert error_ratio(stream(model, video, timestep, keywords), exact, plain).worst <= 1


@torch.no_grad()
def test_too_short_a_window_would_be_noticed():
    """The comparison above can fail: a stream under another window is far off."""
    model = model_of(config(mask=FrameMask(past=2, future=0)))
    video, timestep, keywords = inputs((2, 3, 8, 4, 6), per_frame=True)
    whole = model(video, timestep, **keywords)
    other = model_of(config(mask=FrameMask(past=1, future=0)))
    other.load_state_dict(model.state_dict())
    assert (stream(other, video, timestep, keywords) - whole).abs().max() > 0.01


@torch.no_grad()
def test_chunks_that_are_not_kept_leave_no_trace():
    model = model_of(config(mask=FrameMask(past=1, future=0, chunk=2, sink=1)))
    video, timestep, keywords = inputs((2, 3, 10, 4, 6), per_frame=True)
    twice = stream(model, video, timestep, keywords), stream(model, video, timestep, keywords, disturb=False)
    assert torch.equal(*twice)


class NoSync(TorchDispatchMode):
    """Fails where the host would wait for the device, and counts the elements that are copied."""

    def __init__(self):
        super().__init__()
        self.copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for a value"
        if func is torch.ops.aten.copy_.default:
            self.copied += args[0].numel()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_chunk_copies_its_own_keys_only_and_does_not_wait():
    given = config(mask=FrameMask(past=6, future=0, chunk=2), text_width=None, classes=None)
    model = model_of(given)
    cache = model.new_cache(1, 4, 6)
    memory, places = cache.nbytes, [ring.k.data.data_ptr() for ring in cache.rings]
    for _ in range(20):
        with NoSync() as watch:
            model(torch.randn(1, 3, 2, 4, 6), torch.zeros(1), cache=cache, keep=True)
        assert watch.copied == given.depth * 2 * (2 * 6 * given.width)  # k and v of 2 frames with 6 tokens, per layer
    assert cache.nbytes == memory == given.depth * 2 * (7 * 2) * 6 * given.width * 4
    assert [ring.k.data.data_ptr() for ring in cache.rings] == places


@torch.no_grad()
def test_a_cache_begins_again():
    model = model_of(config(mask=FrameMask(past=1, future=0), text_width=None, classes=None))
    cache, video = model.new_cache(1, 4, 6), torch.randn(1, 3, 1, 4, 6)
    first = model(video, torch.zeros(1), cache=cache, keep=True)
    model(video, torch.zeros(1), cache=cache, keep=True)
    cache.reset()
    assert torch.equal(model(video, torch.zeros(1), cache=cache, keep=True), first)


@torch.no_grad()
def test_under_autocast_the_cache_has_its_dtype():
    model = model_of(config(mask=FrameMask(past=1, future=0), text_width=None, classes=None))
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(1, 4, 6)
        out = model(torch.randn(1, 3, 1, 4, 6), torch.zeros(1), cache=cache)
    assert cache.rings[0].k.data.dtype == out.dtype == torch.bfloat16


def test_what_cannot_be_cached():
    video = torch.randn(1, 3, 2, 4, 6)
    model = model_of(config(mask=FrameMask(past=1, future=0), text_width=None, classes=None))
    with pytest.raises(ValueError, match=r"a chunk must have mask.chunk = 1 frames, got 2"):
        model(video, torch.zeros(1), cache=model.new_cache(1, 4, 6))
    with pytest.raises(
        ValueError, match=r"new_cache: dtype must be a floating point one or torch.int8, got torch.int32"
    ):
        model.new_cache(1, 4, 6, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"new_cache: relative must be False with position sincos"):
        model.new_cache(1, 4, 6, relative=True)
    shots = model_of(config(mask=FrameMask(past=1, future=0, shots=(0, 4)), text_width=None, classes=None))
    with pytest.raises(ValueError, match=r"new_cache: the model's mask must have neither shots nor a clean half"):
        shots.new_cache(1, 4, 6)
    with pytest.raises(ValueError, match="height must be a multiple of the patch size 2, got 5"):
        model.new_cache(1, 5, 6)
    with pytest.raises(ValueError, match="the model's mask must be causal by chunks, future=0"):
        model_of(config(mask=FrameMask.symmetric(1))).new_cache(1, 4, 6)
    endless = model_of(config(mask=FrameMask.causal(), text_width=None, classes=None))
    with pytest.raises(ValueError, match="frames must be the length of the longest stream"):
        endless.new_cache(1, 4, 6)
    cache = endless.new_cache(1, 4, 6, frames=1)
    with torch.no_grad():
        endless(video[:, :, :1], torch.zeros(1), cache=cache, keep=True)
        with pytest.raises(ValueError, match="made for at most 1 frames, got frame 2"):
            endless(video[:, :, :1], torch.zeros(1), cache=cache)
