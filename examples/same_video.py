"""Does the swap change the video? A pipeline's, from one seed, as diffusers makes it and on vdcore, side by side.

The pipeline is Wan's, tiny and with random weights: its video is noise, and the comparison is what yours would be. With
``--window N`` it is of a model whose full attention sees N frames to either side, which changes the video and should.
"""

import argparse

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from vdcore import FrameMask
from vdcore.integrations.diffusers import swap_in


def pipeline():
    torch.manual_seed(0)
    made = WanPipeline(
        tokenizer=None,
        text_encoder=None,  # the prompt comes embedded
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    made.set_progress_bar_config(disable=True)
    return made


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--window", type=int, help="frames to either side; default: all of them")
    parser.add_argument("--out", default="out/same_video.png")
    options = parser.parse_args(arguments)
    pipe = pipeline()
    report = swap_in(pipe, mask=None if options.window is None else FrameMask.symmetric(options.window))
    print(report)
    prompt = torch.randn(2, 1, 16, 32)
    found = report.check(
        pipe,
        prompt_embeds=prompt[0],
        negative_prompt_embeds=prompt[1],
        height=48,
        width=64,
        num_frames=options.frames,
        num_inference_steps=options.steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    print(found.show(options.out))


if __name__ == "__main__":
    main()
