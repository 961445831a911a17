"""Small models whose every weight matters, and the same models in float64 and in plain PyTorch."""

from contextlib import contextmanager
from unittest import mock

import torch

from vdcore import FrameMask
from vdcore.models import VDiT, VDiTConfig, attention, block
from vdcore.testing import TORCH_FORMS, error_ratio

SIZE = (2, 3, 4, 6, 8)  # (B, C, T, H, W): 12 tokens a frame


def config(**given):
    sizes = {"in_channels": 3, "width": 32, "depth": 2, "heads": 2, "text_width": 10, "classes": 4}
    return VDiTConfig(**{**sizes, **given})


def model_of(given):
    """With random weights everywhere: as initialised, gates are closed and hide what is behind them."""
    model = VDiT(given)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def inputs(size=SIZE, per_frame=False, given=None):
    """Video, timestep and keyword arguments."""
    B, _, T, _, _ = size
    keywords = {}
    if given is None or given.text_width is not None:
        keywords |= {"text": torch.randn(B, 5, 10), "text_lengths": torch.tensor([5, 3])[:B]}
    if given is None or given.classes is not None:
        keywords["label"] = torch.tensor([1, 4])[:B]
    return torch.randn(size), torch.rand(B, T) * 1000 if per_frame else torch.rand(B) * 1000, keywords


@contextmanager
def in_plain_torch(name):
    """All operators of the models as PyTorch users write them; attention ``"naive"`` or ``"sdpa"``."""
    layers = mock.patch.multiple(
        attention, **{op: forms.get(name, forms.get("eager")) for op, forms in used(attention)}
    )
    rows = mock.patch.multiple(block, **{op: forms["eager"] for op, forms in used(block)})
    with layers, rows:
        yield


def used(module):
    return [(op, forms) for op, forms in TORCH_FORMS.items() if hasattr(module, op)]


def to_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def doubled(model):
    """The model in float64, whose operators the reference runs."""
    exact = type(model)(model.config).double()
    exact.load_state_dict(model.state_dict())
    return exact


def ratio(model, out, video, timestep, **keywords):
    """Error of ``out`` over what the tolerance rule allows."""
    with torch.no_grad():
        exact = doubled(model)(to_double(video), timestep, **{name: to_double(x) for name, x in keywords.items()})
        plain = []
        for name in ("naive", "sdpa"):
            with in_plain_torch(name):
                plain.append(model(video, timestep, **keywords))
    return error_ratio(out, exact, plain).worst


MASKS = (FrameMask.full(), FrameMask.window(1), FrameMask(past=1, future=0, chunk=2, sink=1), FrameMask.symmetric(1))
