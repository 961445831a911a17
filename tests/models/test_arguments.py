"""Bad configurations and bad inputs: the error names the argument, what was expected and what came."""

import pytest
import torch
from vdits import config, inputs, model_of

from vdcore import FrameMask
from vdcore.models import VDiTConfig


@pytest.mark.parametrize(
    "given,message",
    [
        ({"attention": "temporal"}, "attention must be one of spatial, factorized, alternating, gated, full"),
        ({"modulation": "none"}, "modulation must be one of zero, single"),
        ({"position": "learned"}, "position must be one of sincos, rope"),
        ({"gate": "channel"}, "gate must be one of scalar, head, token"),
        ({"width": 30, "heads": 4}, "heads must divide width = 30, got 4"),
        ({"kv_heads": 4}, "kv_heads must divide heads = 6, got 4"),
        ({"patch": (2, 2)}, "patch must be three sizes"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"width": 30, "heads": 3}, "width must be a multiple of 4"),
        ({"width": 12, "heads": 4, "position": "rope"}, "width / heads must be even"),
        (
            {"width": 12, "heads": 3, "position": "rope", "attention": "full"},
            "width / heads must be even, and at least 6 with full",
        ),
    ],
)
def test_configuration(given, message):
    with pytest.raises(ValueError, match=f"VDiTConfig: {message}"):
        VDiTConfig(**given)


def test_configuration_as_text():
    given = config(mask=FrameMask(past=2, future=0, chunk=3, sink=1), patch=(2, 1, 1), attention="gated")
    assert VDiTConfig.from_json(given.to_json()) == given
    for text in ("{}", "[1]", "not json", '{"mask": {"paste": 1}}'):
        with pytest.raises(ValueError, match="VDiTConfig: expected JSON with the fields in_channels"):
            VDiTConfig.from_json(text)


def call(**changed):
    model = model_of(config(mask=FrameMask.window(1)))
    video, timestep, keywords = inputs()
    given = {"video": video, "timestep": timestep, **keywords, **changed}
    return model(given.pop("video"), given.pop("timestep"), **given)


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"video": torch.zeros(2, 4, 4, 6, 8)}, r"video must be \(B, C, T, H, W\) with C = 3, got \(2, 4, 4, 6, 8\)"),
        ({"video": torch.zeros(2, 3, 4, 6)}, "video must be"),
        ({"video": torch.zeros(2, 3, 4, 6, 7)}, "multiple of the patch size 2 in its width W, got 7"),
        (
            {"timestep": torch.zeros(3)},
            r"timestep must be \(B,\), \(B, T'\) or \(B, T\) = \(2,\), \(2, 4\) or \(2, 4\), got \(3,\)",
        ),
        ({"timestep": torch.zeros(2, 3)}, "timestep must be"),
        ({"text": None}, r"text must be \(B, L, 10\); for no text, any with text_lengths of 0, got None"),
        ({"text": torch.zeros(2, 5, 9)}, "text must be"),
        ({"text": torch.zeros(3, 5, 10)}, "text must be"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, r"label must be integers \(B,\) = \(2,\)"),
        ({"label": torch.zeros(2)}, "label must be integers"),
        ({"positions": torch.zeros(3)}, r"positions must be \(T',\) = \(4,\), got \(3,\)"),
        ({"control": [torch.zeros(1)] * 3}, "control must be at most 2 tensors, one per block, got 3"),
        ({"cache": model_of(config(mask=FrameMask.window(1))).new_cache(2, 8, 8)}, "cache must be made for"),
    ],
)
def test_forward(changed, message):
    with pytest.raises(ValueError, match=message), torch.no_grad():
        call(**changed)


def test_what_the_model_has_not():
    model = model_of(config(text_width=None, classes=None))
    video, timestep, keywords = inputs()
    with pytest.raises(ValueError, match="text must be None for a model with text_width None"):
        model(video, timestep, text=keywords["text"])
    with pytest.raises(ValueError, match="label must be None for a model without classes"):
        model(video, timestep, label=keywords["label"])


def test_dtypes():
    with pytest.raises(TypeError, match="patchify: weight must be"):
        call(video=torch.zeros(2, 3, 4, 6, 8, dtype=torch.float64))
