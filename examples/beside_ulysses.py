"""Compares context parallelism in diffusers, Ulysses, with vdcore's, on one Wan transformer of diffusers.

Two processes on this machine, over gloo. For both: bytes that a rank sends in an attention layer, forward, over those
of the whole tensor M; the most memory that a step holds; its time; and the error of the parameters' gradients, averaged
over ranks as DDP and FSDP2 average them, beside one process. Every rank passes the whole video, gets the whole result
and computes the whole loss.
"""

import argparse
import time

import torch

from vdcore.parallel import Allocations, Traffic
from vdcore.parallel.world import run_ranks

T, ROWS, WIDTH, HEADS, DEPTH = 8, 32, 384, 12, 2


def model_and_steps():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    video, target = torch.randn(2, 1, 4, T, ROWS, ROWS)
    text = torch.randn(1, 8, 64)
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

    def forward():
        return model(video, torch.tensor([500]), text, return_dict=False)[0]

    def step():
        ((forward() - target) ** 2).mean().backward()

    return model, forward, step


def share(model, mesh, plan):
    """The model's videos among the processes of the mesh; ``plan`` None: by diffusers."""
    if plan is None:
        from diffusers import ContextParallelConfig

        torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and without an accelerator it is 0
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=mesh.size()))
    else:
        from vdcore.integrations.diffusers import swap_in

        swap_in(model, mesh=mesh, plan=plan)


def compare(mesh, plan):
    """What a rank finds; ``plan`` None: theirs."""
    model, forward, step = model_and_steps()
    step()
    exact = [p.grad.clone() for p in model.parameters()]
    share(model, mesh, plan)
    for p in model.parameters():
        p.grad.zero_()
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
    with Traffic(mesh.get_local_rank()) as traffic, torch.no_grad():
        forward()
    sent = traffic.sent["all_to_all_single"] / DEPTH / (T * (ROWS // 2) ** 2 * WIDTH * 4)
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
