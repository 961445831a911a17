"""Shows streaming: frames without end from a chunk-causal model, at constant time and memory per frame.

Keys and values of past frames lie in a ring, as far back as the model's mask sees. The weights are random: time and
memory do not depend on them.
"""

import argparse
import time

import torch

from vdcore import FrameMask
from vdcore.diffusion import roll
from vdcore.diffusion.training import process_for
from vdcore.models import VDiT, VDiTConfig


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--width", type=int, default=128, help="channels per token")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    # Chunks of 4 frames are denoised together, and see 3 chunks of the past and the first 4 frames of the video.
    mask = FrameMask(past=3, future=0, chunk=4, sink=4)
    model = VDiT(VDiTConfig(in_channels=4, width=options.width, depth=4, heads=4, mask=mask, position="rope")).eval()
    cache = model.new_cache(1, 32, 32)
    noises = (torch.randn(1, 4, mask.chunk, 32, 32) for _ in range(options.frames // mask.chunk))
    begin, frames, reported = time.perf_counter(), 0, 0
    for chunk in roll(model, process_for("flow"), noises, 4, cache):
        frames += chunk.shape[2]
        if frames - reported >= options.frames / 8:
            now = time.perf_counter()
            per_frame = 1e3 * (now - begin) / (frames - reported)
            print(f"frame {frames}: {per_frame:.1f} ms per frame, cache {cache.nbytes / 2**20:.1f} MiB")
            begin, reported = now, frames


if __name__ == "__main__":
    main()
