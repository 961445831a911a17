"""Shows memory before anything runs: a model's peak against frames, as it comes, with naive attention, and swapped.

It is found by runs on fake tensors, which take neither memory nor a GPU. ``vdcore profile`` also measures what fits:

    PYTHONPATH=examples vdcore profile --model memory_before:wan --frames 5,9,21 --memory-limit 24GiB
"""

import argparse

import diffusers
import torch

from vdcore_bench.suites.models.given import HOST, NAIVE, SWAPPED, GivenPoint, predict_memory


def wan(frames):
    """Two blocks of Wan 1.3B's width on latents of 240 x 416 pixels, and the arguments of its forward."""
    model = diffusers.WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=2)
    given = {"hidden_states": torch.randn(1, 16, frames, 30, 52), "encoder_hidden_states": torch.randn(1, 128, 4096)}
    return model, {**given, "timestep": torch.tensor([500])}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="memory_before:wan", help="module:function, as vdcore profile takes it")
    parser.add_argument("--frames", type=int, nargs="+", default=[5, 21, 81])
    parser.add_argument("--mode", default="fwd", help="fwd, or fwd+bwd for training")
    options = parser.parse_args(arguments)
    who = (HOST, NAIVE, SWAPPED)
    print(f"| frames | {' | '.join(who)} |\n| ---: |{' ---: |' * len(who)}")
    for frames in options.frames:
        points = [GivenPoint(options.model, provider, frames, mode=options.mode) for provider in who]
        sizes = (predict_memory(point) / 2**20 for point in points)
        print(f"| {frames} | {' | '.join(f'{size:,.0f} MiB' for size in sizes)} |", flush=True)


if __name__ == "__main__":
    main()
