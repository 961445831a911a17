"""Shows context parallelism: processes share the frames of one video, and train as one process would.

Starts them on this machine, over gloo; on several GPUs the same functions run under torchrun, over NCCL.
"""

import argparse

import torch

from vdcore.models import VDiT, VDiTConfig
from vdcore.parallel import Allocations, Traffic, average_gradients, part_sizes
from vdcore.parallel.world import run_ranks

FRAMES = 6


def train(mesh, attention, steps):
    """What every rank runs: the same model and video, its own frames, the mean of gradients."""
    torch.manual_seed(0)  # by data, not by rank: all ranks draw the same video and noise
    config = VDiTConfig(in_channels=4, width=96, depth=4, heads=3, attention=attention, position="rope", qk_norm=True)
    model = VDiT(config, mesh=mesh)
    clip, noise = torch.randn(2, 1, 4, FRAMES, 32, 32)
    sizes = part_sizes(FRAMES, mesh.size())
    part, aim = (x.split(sizes, 2)[mesh.get_local_rank()] for x in (torch.lerp(clip, noise, 0.5), noise - clip))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        with Traffic(mesh.get_local_rank()) as traffic, Allocations() as allocations:
            out = model(part, torch.tensor([500.0]), frames=FRAMES)
            loss = ((out - aim) ** 2).sum() / clip.numel()  # over the elements of the whole: ranks' losses add up
            loss.backward()
        average_gradients(model, mesh)
        optimizer.step()
        losses.append(loss.item())
    return losses, traffic.bytes, allocations.peak


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="1,2", help="numbers of processes, one after another")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--attention", default="factorized", help="factorized, gated or full")
    options = parser.parse_args(arguments)
    from on_ranks import train  # by the name under which the processes find it

    for ranks in map(int, options.ranks.split(",")):
        found = run_ranks(train, ranks, options.attention, options.steps)
        first, last = (sum(losses[i] for losses, _, _ in found) for i in (0, -1))
        sent, peak = max(x[1] for x in found), max(x[2] for x in found)
        print(f"{ranks} ranks: loss {first:.6f} to {last:.6f}, ", end="")
        print(f"a step sends {sent / 1e6:.2f} MB per rank and holds {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
