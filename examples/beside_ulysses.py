"""Compares context parallelism in diffusers, Ulysses on its Wan transformer, with vdcore's on a VDiT of its size.

Two processes on this machine, over gloo. For both: bytes that a rank sends in an attention layer, forward, over those
of the whole tensor M; the most memory that a step holds; its time; and the error of the parameters' gradients, averaged
over ranks as DDP and FSDP2 average them, beside one process.
"""

import argparse
import time

import torch

from vdcore.models import VDiT, VDiTConfig
from vdcore.parallel import Allocations, Traffic, part_sizes
from vdcore.parallel.world import run_ranks

T, ROWS, WIDTH, HEADS, DEPTH = 8, 32, 384, 12, 2


def draw():
    torch.manual_seed(0)
    video, target = torch.randn(2, 1, 4, T, ROWS, ROWS)
    return video, target, torch.randn(1, 8, 64)


def theirs(mesh):
    """Wan: every rank passes the whole video, gets the whole result and computes the whole loss."""
    from diffusers import ContextParallelConfig, WanTransformer3DModel

    video, target, text = draw()
    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=256,
        ffn_dim=4 * WIDTH,
        num_layers=DEPTH,
    )

    def step():
        out = model(video, torch.tensor([500]), text, return_dict=False)[0]
        ((out - target) ** 2).mean().backward()

    def share():
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and without an accelerator it is 0
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=mesh.size()))

    return model, step, share


def ours(mesh, plan):
    """A VDiT: every rank passes and gets its frames, and computes its part of the loss."""
    video, target, text = draw()
    config = VDiTConfig(
        width=WIDTH, heads=HEADS, depth=DEPTH, attention="full", position="rope", qk_norm=True, text_width=64
    )
    model, shared = VDiT(config), VDiT(config, mesh=mesh, plan=plan)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    shared.load_state_dict(model.state_dict())
    sizes, rank = part_sizes(T, mesh.size()), mesh.get_local_rank()
    parts = [(model, video, target)]

    def step():
        running, x, aim = parts[-1]
        out = running(x, torch.tensor([500.0]), text=text, frames=T if running is shared else None)
        (((out - aim) ** 2).sum() / target.numel()).backward()

    def share():
        for p, q in zip(shared.parameters(), model.parameters()):
            p.grad = q.grad
        model.parameters = shared.parameters
        parts.append((shared, video.split(sizes, 2)[rank], target.split(sizes, 2)[rank]))

    return model, step, share


def compare(mesh, plan):
    """What a rank finds; ``plan`` None: theirs."""
    model, step, share = theirs(mesh) if plan is None else ours(mesh, plan)
    step()
    exact = [p.grad.clone() for p in model.parameters()]
    share()
    for p in model.parameters():
        p.grad.zero_()
    with Traffic(mesh.get_local_rank()) as traffic:
        step()
    error, scale = 0.0, 0.0
    for p, one in zip(model.parameters(), exact):
        torch.distributed.all_reduce(p.grad)
        error = max(error, ((p.grad / mesh.size() - one).norm() / one.norm()).item())
        scale = max(scale, ((p.grad / mesh.size() * one).sum() / one.square().sum()).item())
    with Allocations() as allocations:
        step()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    whole = T * (ROWS // 2) ** 2 * WIDTH * 4
    # Forward, an attention layer: half of the exchanges of Ulysses, whose backward sends as much; a third of a ring's.
    sent = traffic.sent["all_to_all_single"] / DEPTH / whole * (1 / 3 if plan == "ring" else 1 / 2)
    return sent, allocations.peak, sorted(seconds)[2], scale, error


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args(arguments)
    from beside_ulysses import compare  # by the name under which the processes find it

    print("way                   sent / M   memory   time of a step   gradients: times those of one process, error")
    for name, plan in (("diffusers, Ulysses", None), ("vdcore, heads", "heads"), ("vdcore, ring", "ring")):
        found = run_ranks(compare, options.ranks, plan)
        sent, peak, seconds, scale, error = (max(column) for column in zip(*found))
        print(f"{name:20}  {sent:8.3f}  {peak / 1e6:4.0f} MB  {1e3 * seconds:12.0f} ms  {scale:8.4f}   {error:.1e}")


if __name__ == "__main__":
    main()
