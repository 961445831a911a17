"""Shows training: a small video DiT learns clips of moving shapes. The loss halves within a minute.

``vdcore train`` does the same at length, with progress, checkpoints to go on from, and video files as data.
"""

import argparse
from dataclasses import replace

from vdcore.diffusion.data import Scenes
from vdcore.diffusion.training import SCENES, SMALL, Recipe, Trainer


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=96, help="channels per token")
    parser.add_argument("--out", default="out/examples/checkpoint.safetensors", help="where sample.py finds the model")
    options = parser.parse_args(arguments)
    model = replace(SMALL, width=options.width, depth=4)
    recipe = Recipe(model=model, steps=options.steps)
    trainer = Trainer(recipe, Scenes(replace(SCENES, frames=recipe.frames, size=recipe.size)))
    losses = []
    for step in range(1, options.steps + 1):
        losses.append(trainer.step())
        if step % 10 == 0 or step == options.steps:
            print(f"step {step}: loss {sum(losses[-10:]) / len(losses[-10:]):.3f}")
    print(trainer.save(options.out))


if __name__ == "__main__":
    main()
