"""The rolling cache against recomputing every frame, under many masks."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from vdcore import FrameMask
from vdcore.diffusion import Process, horizon, roll, roll_by_recomputing, sample, self_forcing
from vdcore.models import VDiT, VDiTConfig
from vdcore.testing import error_ratio


def moved(model):
    """Weights as training leaves them: the gates of AdaLN-Zero are open."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=random)
    return model.eval()


def model_of(mask, attention="factorized", position="rope"):
    torch.manual_seed(0)
    config = VDiTConfig(
        in_channels=2,
        patch=(1, 2, 2),
        width=24,
        depth=2,
        heads=2,
        attention=attention,
        mask=mask,
        position=position,
        qk_norm=True,
    )
    return moved(VDiT(config))


def noises(chunks, chunk, generator):
    return [torch.randn(2, 2, chunk, 4, 6, generator=generator) for _ in range(chunks)]


MASKS = (FrameMask(1, 0, 2), FrameMask(2, 0, 2, sink=1), FrameMask(0, 0, 3), FrameMask(3, 0, 1, sink=2))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("attention", ("factorized", "full"))
def test_rolling_equals_recomputing(mask, attention, generator):
    """By the tolerance rule, over more chunks than the window holds: the ring has gone round."""
    process = Process(FlowMatchEulerDiscreteScheduler(), "sample")
    model, noise = model_of(mask, attention), noises(6, mask.chunk, generator)
    ours = torch.cat(list(roll(model, process, noise, 2)), 2)
    whole = torch.cat(list(roll_by_recomputing(model, process, noise, 2)), 2)
    exact = torch.cat(list(roll_by_recomputing(model.double(), process, [x.double() for x in noise], 2)), 2)
    assert ours.shape == (2, 2, 6 * mask.chunk, 4, 6)
    assert error_ratio(ours, exact, [whole]).worst <= 1


def test_the_window_is_what_is_remembered(generator):
    """Without the past the chunks come out otherwise; a chunk that has left the window is forgotten."""
    process = Process(DDIMScheduler(clip_sample=False))
    noise = noises(4, 2, generator)

    def last(mask, change):
        first = [noise[0] + change, *noise[1:]]
        return list(roll(model_of(mask), process, first, 2))[-1]

    two = FrameMask(past=1, future=0, chunk=2)
    assert not torch.equal(last(FrameMask(past=3, future=0, chunk=2), 0.0), last(two, 0.0))
    assert torch.equal(last(FrameMask(past=0, future=0, chunk=2), 1.0), last(FrameMask(past=0, future=0, chunk=2), 0.0))
    remembered = FrameMask(past=0, future=0, chunk=2, sink=2)
    assert not torch.equal(last(remembered, 1.0), last(remembered, 0.0))


class Saved:
    """What a graph keeps for backward, and how much of it is alive."""

    alive = packed = 0

    def __init__(self, x):
        self.x = x.clone()  # so that the graph's tensors are not kept by others
        self.nbytes = x.nbytes
        Saved.alive += self.nbytes
        Saved.packed += self.nbytes

    def __del__(self):
        Saved.alive -= self.nbytes


@pytest.mark.parametrize("relative", (False, True))
def test_learning_from_a_rollout_takes_the_memory_of_one_chunk(generator, relative):
    process = Process(FlowMatchEulerDiscreteScheduler())
    model, noise = model_of(FrameMask(past=1, future=0, chunk=2, sink=1), "full"), noises(7, 2, generator)
    cache, packed = model.new_cache(2, 4, 6, relative=relative), []
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
        for _ in self_forcing(model, process, noise, 2, lambda chunk, i: chunk.square().mean(), cache):
            packed.append(Saved.packed)
            assert Saved.alive == 0, "the chunk's graph is gone"
    of_chunk = [b - a for a, b in zip([0, *packed], packed)]
    assert of_chunk[0] > 0 and len(set(of_chunk[3:])) == 1, "the same for every chunk, once the window is full"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_rollout_s_gradients_are_those_of_each_chunk_s_last_step(generator):
    """By hand: every chunk at the noise of its last step, after a cache that holds what was drawn before it."""
    process = Process(FlowMatchEulerDiscreteScheduler(), "sample")
    model, noise = model_of(FrameMask(past=1, future=0, chunk=2)).double(), noises(4, 2, generator)
    noise = [x.double() for x in noise]
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in noise]

    def loss(chunk, i):
        return None if i == 1 else (chunk * weights[i]).sum()

    drawn = list(self_forcing(model, process, noise, 2, loss))
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = list(roll(model, process, noise, 2))
    torch.testing.assert_close([chunk for chunk, _ in drawn], plain)
    assert drawn[1][1] is None and drawn[2][1].item() == pytest.approx(loss(drawn[2][0], 2).item())
    cache = model.new_cache(2, 4, 6)
    for i, x in enumerate(noise):
        seen = []

        def denoise(video, timestep, seen=seen):
            seen.append((video, timestep))
            return model(video, timestep, cache=cache)

        clean = sample(denoise, process, x, 2)
        if loss(clean, i) is not None:
            (model(*seen[-1], cache=cache) * weights[i]).sum().backward()  # it predicts the clean video itself
        with torch.no_grad():
            model(clean, torch.zeros(2, dtype=torch.float64), cache=cache, keep=True)
    # The scheduler steps in float32, whose rounding the last bit of a float64 turns.
    torch.testing.assert_close(found, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)


def test_a_cache_goes_on(generator):
    """Rolling in two calls with one cache is rolling in one."""
    process = Process(FlowMatchEulerDiscreteScheduler())
    model, noise = model_of(FrameMask(2, 0, 2)), noises(5, 2, generator)
    whole = list(roll(model, process, noise, 2))
    cache = model.new_cache(2, 4, 6)
    memory = cache.nbytes
    parts = [*roll(model, process, noise[:3], 2, cache), *roll(model, process, noise[3:], 2, cache)]
    assert all(torch.equal(a, b) for a, b in zip(parts, whole))
    assert cache.nbytes == memory


def test_horizon():
    assert horizon(5, 24, chunk=3, temporal_stride=4) == FrameMask(past=10, future=0, chunk=3)
    assert horizon(5, 24, chunk=8, temporal_stride=4, sink=2) == FrameMask(past=4, future=0, chunk=8, sink=2)
    assert horizon(0, 24, chunk=4) == FrameMask(past=0, future=0, chunk=4)
    for seconds, fps, chunk in ((1, 8, 3), (0.5, 30, 4), (2, 12, 5)):
        mask = horizon(seconds, fps, chunk)
        first = 40 * chunk
        runs = mask.runs(1, q_start=first)
        assert first - runs[0][0][0] >= seconds * fps > first - runs[0][0][0] - chunk
    with pytest.raises(ValueError, match="past must be at least 0"):
        horizon(-1, 24, 3)
