"""What is special about diffusing video, over the schedulers of diffusers.

A denoiser is any function of a noisy video ``(B, C, T, H, W)`` and timesteps ``(B,)`` or ``(B, T)``. Everything here
takes one, and what makes a denoiser do more (guidance, blended chunks, interleaved frames) is a denoiser again.
"""

from vdcore.diffusion.long import blended, chunk_starts, interleaved, keyframes, splice
from vdcore.diffusion.process import KINDS, Denoise, Process, hold_timesteps
from vdcore.diffusion.rolling import horizon, roll, roll_by_recomputing, self_forcing
from vdcore.diffusion.sampling import Sampler, guided, make_sampler, pyramid, sample, sample_frames, timesteps

__all__ = [
    "KINDS",
    "Denoise",
    "Process",
    "Sampler",
    "blended",
    "chunk_starts",
    "guided",
    "hold_timesteps",
    "horizon",
    "interleaved",
    "keyframes",
    "make_sampler",
    "pyramid",
    "roll",
    "roll_by_recomputing",
    "sample",
    "sample_frames",
    "self_forcing",
    "splice",
    "timesteps",
]
