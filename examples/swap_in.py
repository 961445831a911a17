"""Shows the swap: a model of diffusers gives the same video on vdcore, in less time, and swapping out restores it.

The model is Latte's, with Latte-1's width, few layers and random weights; the clip has 16 frames of 128x128 pixels.
"""

import argparse
import time

import torch
from diffusers import LatteTransformer3DModel

from vdcore.integrations.diffusers import swap_in, swap_out


@torch.no_grad()
def run(model, inputs, calls):
    """The result and the least seconds of a call, the first of which warms up."""
    seconds = []
    for _ in range(1 + calls):
        begin = time.perf_counter()
        out = model(**inputs, return_dict=False)[0]
        seconds.append(time.perf_counter() - begin)
    return out, min(seconds[1:])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2, help="pairs of a spatial and a temporal block")
    parser.add_argument("--latent", type=int, default=16, help="rows and columns of the latent video")
    parser.add_argument("--calls", type=int, default=2, help="timed calls")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = LatteTransformer3DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=options.layers,
        cross_attention_dim=1152,
        caption_channels=4096,
        sample_size=options.latent,
        patch_size=2,
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=16,
        activation_fn="gelu-approximate",
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, options.latent, options.latent),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 20, 4096),
    }
    before, seconds_before = run(model, inputs, options.calls)
    report = swap_in(model)
    print(report)
    after, seconds_after = run(model, inputs, options.calls)
    swap_out(model)
    restored, _ = run(model, inputs, 1)
    print(f"diffusers {seconds_before:.3f} s, vdcore {seconds_after:.3f} s")
    print(f"largest difference {(after - before).abs().max():.1e} of values up to {before.abs().max():.1f}")
    print(f"bit for bit as before after swap_out: {'yes' if torch.equal(restored, before) else 'no'}")


if __name__ == "__main__":
    main()
