"""Keys that are rotated when they are read, by their place in the window; keys and values in fewer bytes; gradients of
one chunk."""

import pytest
import torch
from test_cache import NoSync
from vdits import config, doubled, in_plain_torch, inputs, model_of, to_double

from vdcore import FrameMask, Rope, qk_norm_rope
from vdcore.models import attention as layers
from vdcore.models.cache import FrameCache, _encoded, slots_needed
from vdcore.models.position import full_rope, time_rope
from vdcore.testing import error_ratio

MASKS = [
    FrameMask(past=past, future=0, chunk=chunk, sink=sink)
    for past, chunk, sink in ((0, 2, 0), (1, 2, 0), (1, 2, 3), (2, 1, 2), (1, 3, 1), (2, 2, 4))
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: f"past{m.past}-chunk{m.chunk}-sink{m.sink}")
def test_positions_are_those_of_the_window(mask):
    """Sinks from 0 on, then the window in order, whichever slots its frames lie in; far into a stream too."""
    chunk, T = mask.chunk, 24
    for start in (0, 10**6 * chunk):
        cache = FrameCache(mask, slots_needed(mask, None), 1, (1, 1), [], frames=start, relative=True)
        held = dict(enumerate(range(mask.sink))) if start else {}
        for c in range(T // chunk):
            place, positions = cache.place(chunk), cache.positions(chunk, torch.device("cpu")).tolist()
            for first, slot, n in place.runs:
                held |= {slot + i: cache.frames + first + i for i in range(n)}
            slots, own = positions[: place.visible], positions[place.visible :]
            assert place.relative and len(own) == chunk
            assert own == [place.visible - chunk + i for i in range(chunk)]
            if start == 0 or c * chunk > cache.slots:  # the window's frames are known
                frames = sorted(held[slot] for slot in range(place.visible))
                assert slots == [float(frames.index(held[slot])) for slot in range(place.visible)]
            cache.frames += chunk


def recomputed(self, operator, x, context, ring, rope):
    """Every chunk of a video against the frames that it sees, with positions counted from the first of these."""
    q, k, v = self.split(self.qkv(x))
    q, k = qk_norm_rope(q, k, norm=self.norm())
    mask, out = self.mask, []
    for start in range(0, x.shape[1], mask.chunk):
        frames = [f for run in mask.runs(mask.chunk, q_start=start)[0] for f in range(*run)]
        positions = torch.arange(len(frames), dtype=torch.float64)
        theta, D = 100.0, self.head_dim
        full = isinstance(self, layers.FullAttention)
        table = full_rope(positions, context.grid[1:], D, theta) if full else time_rope(positions, D, theta)
        table = Rope(table.cos.to(x.dtype), table.sin.to(x.dtype))
        new = slice(start, start + mask.chunk)
        out.append(operator(q[:, new], k[:, frames], v[:, frames], rope=table))
    return self.proj(layers.merged(torch.cat(out, 1)))


def stream(model, video, timestep, keywords, **kind):
    chunk = model.config.mask.chunk
    cache, results = model.new_cache(len(video), *video.shape[3:], relative=True, **kind), []
    for start in range(0, video.shape[2], chunk):
        own = slice(start, start + chunk)
        model(torch.full_like(video[:, :, own], 100), timestep[:, own], cache=cache, **keywords)  # and not kept
        results.append(model(video[:, :, own], timestep[:, own], cache=cache, keep=True, **keywords))
    return torch.cat(results, 2), cache


def model_with(attention, mask, position="rope"):
    given = config(
        attention=attention, mask=mask, position=position, qk_norm=True, kv_heads=1, rope_theta=100.0, depth=2
    )
    return model_of(given), inputs((2, 3, 12, 4, 6), per_frame=True)


STREAMS = [
    ("factorized", MASKS[1], "rope"),
    ("factorized", MASKS[2], "sincos+rope"),
    ("alternating", MASKS[3], "rope"),
    ("full", MASKS[4], "rope"),
    ("full", MASKS[2], "sincos+rope"),
]


@pytest.mark.parametrize("attention, mask, position", STREAMS, ids=lambda x: x if isinstance(x, str) else "")
@torch.no_grad()
def test_equal_to_full_recomputation_with_relative_positions(attention, mask, position, monkeypatch):
    model, (video, timestep, keywords) = model_with(attention, mask, position)
    ours, _ = stream(model, video, timestep, keywords)
    monkeypatch.setattr(layers.SelfAttention, "across_frames", recomputed)
    exact = doubled(model)(to_double(video), timestep, **{name: to_double(x) for name, x in keywords.items()})
    plain = []
    for name in ("naive", "sdpa"):
        with in_plain_torch(name):
            plain.append(model(video, timestep, **keywords))
    assert error_ratio(ours, exact, plain).worst <= 1


@torch.no_grad()
def test_gated_attention_rotates_its_temporal_half():
    """Before the ring has gone round both forms of the cache have the same positions."""
    model, (video, timestep, keywords) = model_with("gated", FrameMask(past=5, future=0, chunk=2))
    ours, _ = stream(model, video, timestep, keywords)
    torch.testing.assert_close(ours, model(video, timestep, **keywords), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8], ids=str)
@torch.no_grad()
def test_a_stream_at_frame_a_million_is_that_at_its_start(dtype):
    """To the bit, once the window is full; with keys that carry the rotation of their frames it is not."""
    mask = MASKS[2]
    model, (video, timestep, keywords) = model_with("full", mask)

    def last(relative, frames_before):
        cache = model.new_cache(2, 4, 6, relative=relative, dtype=dtype)
        for n, start in enumerate(range(0, 12, 2)):
            if n == 4:
                cache.frames += frames_before
            own = slice(start, start + 2)
            out = model(video[:, :, own], timestep[:, own], cache=cache, keep=True, **keywords)
        return out

    window = (mask.past + 1) * mask.chunk
    assert torch.equal(last(True, 0), last(True, 10**6 // window * window))
    assert not torch.equal(last(False, 0), last(False, 10**6 // window * window))


@pytest.mark.parametrize("dtype, allowed", [(torch.bfloat16, 2**-8), (torch.int8, 1 / 254)], ids=str)
def test_what_a_stored_value_errs_by(dtype, allowed):
    """Of the value itself in bfloat16, of the largest of its frame and head in int8."""
    x = torch.randn(2, 3, 5, 2, 16) * torch.logspace(-3, 3, 6).view(1, 3, 1, 2, 1)
    x[0, 0, :, 0] = 0
    data, scale = _encoded(x, dtype)
    read = data.float() if scale is None else data * scale
    most = x.abs() if scale is None else x.abs().amax((2, 4), keepdim=True)
    data = data.to(dtype)
    read = data.float() if scale is None else data * scale
    assert ((read - x).abs() <= allowed * most * (1 + 1e-5)).all()
    assert data.dtype == dtype and read[0, 0, :, 0].abs().max() == 0


@pytest.mark.parametrize(
    "dtype, bytes_per_value, error", [(torch.bfloat16, 2, 0.02), (torch.int8, 1 + 4 / (6 * 16), 0.04)], ids=str
)
@torch.no_grad()
def test_a_stream_with_a_smaller_cache(dtype, bytes_per_value, error):
    model, (video, timestep, keywords) = model_with("full", MASKS[1])
    (exact, whole), (ours, cache) = (stream(model, video, timestep, keywords, dtype=d) for d in (torch.float32, dtype))
    assert cache.nbytes == pytest.approx(whole.nbytes * bytes_per_value / 4)
    gap = (ours - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < gap < error


@torch.no_grad()
def test_nothing_moves_and_nobody_waits():
    model, (video, timestep, keywords) = model_with("full", MASKS[2])
    cache = model.new_cache(2, 4, 6, relative=True, dtype=torch.int8)
    memory, places = cache.nbytes, [ring.k.data.data_ptr() for ring in cache.rings]
    for _ in range(12):
        before = [ring.v.data.clone() for ring in cache.rings]
        slots = [s for _, first, n in cache.place(2).runs for s in range(first, first + n)]
        with NoSync():
            model(video[:, :, :2], timestep[:, :2], cache=cache, keep=True, **keywords)
        for ring, old in zip(cache.rings, before):
            changed = (ring.v.data != old).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
            assert set(changed) <= set(slots), "only the chunk's own slots are written"
    assert cache.nbytes == memory and [ring.k.data.data_ptr() for ring in cache.rings] == places


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_gradients_reach_the_chunk_alone(dtype):
    """Weights' gradients of one chunk, by difference quotients at fixed cache contents; what is stored is what is used,
    whether there are gradients or not."""
    model, (video, timestep, keywords) = model_with("factorized", MASKS[2])
    model, video, keywords = doubled(model), video.double(), {n: to_double(x) for n, x in keywords.items()}
    cache = model.new_cache(2, 4, 6, relative=True, dtype=dtype)

    def chunk(c, keep=False):
        own = slice(2 * c, 2 * c + 2)
        return model(video[:, :, own], timestep[:, own], cache=cache, keep=keep, **keywords)

    with torch.no_grad():
        for c in range(5):
            chunk(c, keep=True)
    out = chunk(5)
    with torch.no_grad():
        torch.testing.assert_close(out.detach(), chunk(5))
    weight = torch.randn_like(out)
    parameters = list(model.parameters())
    grads = torch.autograd.grad((weight * out).sum(), parameters, allow_unused=True)
    if dtype == torch.int8:  # rounding has no derivative: the gradient is that without it
        assert all(g is None or g.isfinite().all() for g in grads)
        return
    directions = [torch.randn_like(p) for p in parameters]
    expected = sum((g * d).sum() for g, d in zip(grads, directions) if g is not None)
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(parameters, directions):
                p += sign * step * d
            values.append((weight * chunk(5)).sum())
            for p, d in zip(parameters, directions):
                p -= sign * step * d
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), expected, rtol=1e-5, atol=1e-6)
