"""Shows sampling: videos from noise by the model that train.py leaves, the longer ones spliced from clips.

Each clip of a long video is given the last two frames of the one before it, and continues them.
"""

import argparse
from pathlib import Path

import torch

from vdcore.diffusion import make_sampler, splice
from vdcore.diffusion.runs import how_to_sample
from vdcore.diffusion.training import load_trained, process_for
from vdcore.video import write_video


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default="out/examples/checkpoint.safetensors")
    parser.add_argument("--count", type=int, default=4, help="videos")
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8, help="of the sampler")
    parser.add_argument("--out", type=Path, default=Path("out/examples"))
    options = parser.parse_args(arguments)
    trained = load_trained(options.checkpoint)
    recipe = trained.recipe
    process = process_for(recipe.target, recipe.sampling_shift)
    generator = torch.Generator().manual_seed(0)
    shape = (options.count, recipe.model.in_channels, *recipe.size)
    how = how_to_sample(options.steps, generator, spliced=True)
    sampler = make_sampler(trained.model, process, shape, options.steps, **how)
    videos = torch.cat(list(splice(sampler, options.frames, recipe.frames, overlap=2)), 2)
    row = torch.cat(list((videos + 1) / 2), -1)
    print(write_video(options.out / "samples.gif", row, 8, scale=4))


if __name__ == "__main__":
    main()
