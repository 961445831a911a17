"""Shows a derivative in the loss: a video DiT learns mean flow (Geng et al. 2025), and draws a clip in one step.

The network predicts the mean velocity ``u(z, r, t)`` of the way from time ``t`` back to ``r``. Its target is
``v - (t - r) du/dt``: the derivative along the flow, a Jacobian-vector product through every attention of the model.
"""

import argparse
from dataclasses import replace

import torch
from torch import nn

from vdcore.diffusion.data import Scenes
from vdcore.diffusion.training import SCENES, SMALL
from vdcore.models import VDiT
from vdcore.models.embedding import TimestepEmbedding


class MeanVelocity(nn.Module):
    """A VDiT that is told both ends of the way: t as its timestep, and t - r on every token.

    Both times tenfold: at 1000, as timesteps are elsewhere, the derivative is mostly the embedding's own waves.
    """

    def __init__(self, config):
        super().__init__()
        self.model, self.span = VDiT(config), TimestepEmbedding(config.width)

    def forward(self, z, r, t):
        span = self.span(10 * (t - r))[:, None, None]
        return self.model(z, 10 * t, control=[span] * len(self.model.blocks))


def loss_of(network, clean, generator):
    noise = torch.randn(clean.shape, generator=generator)
    t, r = torch.rand(2, len(clean), generator=generator).sort(0, descending=True).values
    r = torch.where(torch.rand(len(clean), generator=generator) < 0.5, t, r)  # half of them: flow matching
    along = (t - r)[:, None, None, None, None]
    at = t[:, None, None, None, None]
    z, v = (1 - at) * clean + at * noise, noise - clean
    u, du = torch.func.jvp(network, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    error = (u - (v - along * du).detach()).square().mean((1, 2, 3, 4))
    return (error / (error.detach() + 1e-2)).mean(), error.mean().item()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=96, help="channels per token")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    network = MeanVelocity(replace(SMALL, width=options.width, depth=2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    source, generator, errors = Scenes(SCENES), torch.Generator().manual_seed(0), []
    for step in range(1, options.steps + 1):
        loss, error = loss_of(network, 2 * source.batch(8, generator) - 1, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(error)
        if step % 10 == 0 or step == options.steps:
            print(f"step {step}: error {sum(errors[-10:]) / len(errors[-10:]):.3f}")
    with torch.no_grad():
        noise = torch.randn(4, 3, SCENES.frames, *SCENES.size, generator=generator)
        clips = noise - network(noise, torch.zeros(4), torch.ones(4))
    print(f"clips in one step: mean {clips.mean():.2f}, deviation {clips.std():.2f}")


if __name__ == "__main__":
    main()
