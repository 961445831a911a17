"""Long videos from clips: a denoiser that knows the video must give it back, frame for frame."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from vdcore.diffusion import Process, blended, chunk_starts, interleaved, keyframes, make_sampler, sample, splice

LONG = 64


@pytest.fixture
def truth(generator):
    return torch.randn(2, 3, LONG + 20, 4, 4, generator=generator)


def knowing(truth, log=None):
    """Draws the true frames; insists that what it is given as known is true."""

    def draw(positions, held=None, known=None):
        if log is not None:
            log.append((positions.tolist(), None if held is None else held.tolist()))
        clip = truth[:, :, positions]
        if held is not None:
            assert torch.equal(known[:, :, held], clip[:, :, held])
        return clip

    return draw


@pytest.mark.parametrize("frames,chunk,overlap", ((64, 8, 2), (64, 8, 0), (13, 8, 7), (5, 8, 2), (8, 8, 2), (9, 3, 1)))
def test_splicing_gives_the_video_back(frames, chunk, overlap, truth):
    log = []
    parts = list(splice(knowing(truth, log), frames, chunk, overlap))
    assert torch.equal(torch.cat(parts, 2), truth[:, :, :frames])
    for before, (positions, held) in pairwise(log):
        assert positions == list(range(before[0][0] + chunk - overlap, before[0][0] + 2 * chunk - overlap))
        assert held is None or held == [i < overlap for i in range(chunk)]
    if (frames, chunk, overlap) == (64, 8, 2):
        assert [part.shape[2] for part in parts] == [8, *[6] * 9, 2]


def test_splicing_keeps_a_chunk_alive_and_no_more(truth):
    """When a chunk is drawn, the one before it is all that is left of the video."""
    clips = []

    def draw(positions, held=None, known=None):
        gc.collect()
        assert sum(clip() is not None for clip in clips) <= 1
        clip = truth[:, :, positions].clone()
        clips.append(weakref.ref(clip))
        return clip

    assert sum(part.shape[2] for part in splice(draw, 64, 8, 2)) == 64
    assert len(clips) == 11


@pytest.mark.parametrize("scheduler", (DDIMScheduler(clip_sample=False), FlowMatchEulerDiscreteScheduler()))
def test_splicing_an_oracle_denoiser(scheduler, truth, generator):
    """The whole way, noise and scheduler included: every chunk is denoised to the true frames."""
    process, at = Process(scheduler, "sample"), {}

    def denoise(video, timestep):
        return truth[:, :, at["positions"]]

    inner = make_sampler(denoise, process, (2, 3, 4, 4), 4, generator=generator)

    def draw(positions, *known):
        at["positions"] = positions
        return inner(positions, *known)

    video = torch.cat(tuple(splice(draw, LONG, 8, 2)), 2)
    torch.testing.assert_close(video, truth[:, :, :LONG], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames,chunk,overlap", ((64, 8, 2), (10, 8, 2), (7, 8, 2), (8, 8, 4), (30, 5, 4)))
def test_chunks_cover_everything_once_at_least(frames, chunk, overlap):
    starts = chunk_starts(frames, chunk, overlap)
    covered = {frame for start in starts for frame in range(start, min(start + chunk, frames))}
    assert covered == set(range(frames))
    assert all(b - a <= chunk - overlap for a, b in pairwise(starts))
    assert starts[-1] + chunk == frames or starts == [0]


@pytest.mark.parametrize("frames", (8, 20, 64))
def test_blending_predictions_that_agree_changes_nothing(frames, generator):
    """A denoiser of single frames says the same of a frame in every chunk: the blend is what it says of all at once."""

    def denoise(video, timestep, scale):
        t = timestep[:, None].expand(-1, video.shape[2]) if timestep.ndim == 1 else timestep
        return torch.tanh(video) * scale + t[:, None, :, None, None]

    video = torch.randn(2, 3, frames, 4, 4, generator=generator)
    for timestep in (torch.tensor((3.0, 4.0)), torch.rand(2, frames, generator=generator)):
        whole = denoise(video, timestep, 2.0)
        torch.testing.assert_close(blended(denoise, 8, 2)(video, timestep, scale=2.0), whole)


def test_blend_is_a_ramp():
    """Chunks that disagree: their predictions 0 and 1 cross-fade over the frames that both see."""
    calls = []

    def denoise(video, timestep):
        calls.append(video.shape[2])
        return torch.full_like(video, len(calls) - 1.0)

    out = blended(denoise, 8, 3)(torch.zeros(1, 1, 13, 1, 1), torch.zeros(1))
    torch.testing.assert_close(out.flatten(), torch.tensor((*[0.0] * 5, 0.25, 0.5, 0.75, *[1.0] * 5)))
    assert calls == [8, 8]


@pytest.mark.parametrize("frames,every,keys", ((25, 4, None), (23, 4, None), (64, 8, 3), (9, 1, None), (1, 4, None)))
def test_keyframes_then_what_is_between(frames, every, keys, truth):
    log = []
    video = keyframes(knowing(truth, log), frames, every, keys)
    assert torch.equal(video, truth[:, :, :frames])
    if (frames, every, keys) == (23, 4, None):
        assert log[0] == ([0, 4, 8, 12, 16, 20, 24], None)
        assert log[1] == ([0, 1, 2, 3, 4], [True, False, False, False, True])
        assert len(log) == 7
    if keys == 3:
        assert [positions for positions, _ in log[:4]] == [[0, 8, 16], [16, 24, 32], [32, 40, 48], [48, 56, 64]]


@pytest.mark.parametrize("scale", (1.0, 0.25))
def test_interleaving(scale, generator):
    seen = []

    def denoise(video, timestep, positions):
        seen.append(positions.tolist())
        return video.cumsum(2) + positions[:, None, None] + timestep.view(len(video), 1, -1, 1, 1)

    video = torch.randn(2, 3, 10, 4, 4, generator=generator)
    timestep = torch.rand(2, 10, generator=generator)
    out = interleaved(denoise, 4, scale)(video, timestep)
    for first in range(4):
        part = slice(first, None, 4)
        expected = video[:, :, part].cumsum(2) + (torch.arange(10)[part] * scale)[:, None, None]
        torch.testing.assert_close(out[:, :, part], expected + timestep[:, None, part, None, None])
    assert seen[1] == [1 * scale, 5 * scale, 9 * scale] and len(seen) == 4


def test_they_compose(truth, generator):
    """Interleaved chunks, blended chunks: both are denoisers, so that the sampler takes either at any step."""
    process = Process(FlowMatchEulerDiscreteScheduler(), "sample")

    def denoise(video, timestep, positions=None):
        return torch.zeros_like(video) + 0.25

    near, far = blended(denoise, 8, 2), interleaved(denoise, 4)

    def both(video, timestep):
        return (far if timestep.amax() > 500 else near)(video, timestep)

    out = sample(both, process, torch.randn(1, 3, 32, 4, 4, generator=generator), 6)
    torch.testing.assert_close(out, torch.full_like(out, 0.25), rtol=1e-4, atol=1e-4)


def test_errors(truth):
    draw = knowing(truth)
    with pytest.raises(ValueError, match="splice: overlap must be at least 0 and below the chunk of 8 frames, got 8"):
        next(splice(draw, 64, 8, 8))
    with pytest.raises(ValueError, match="splice: frames must be at least 1, got 0"):
        next(splice(draw, 0, 8, 2))
    with pytest.raises(ValueError, match="keyframes: frames and every must be at least 1, got 8 and 0"):
        keyframes(draw, 8, 0)
    with pytest.raises(ValueError, match="keyframes: keys must be at least 2, got 1"):
        keyframes(draw, 8, 2, keys=1)
    with pytest.raises(ValueError, match="interleaved: every must be at least 1"):
        interleaved(lambda *a: None, 0)
    with pytest.raises(ValueError, match="blended: overlap"):
        blended(lambda *a: None, 4, 4)
