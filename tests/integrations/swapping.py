"""Swapping tiny models in and looking at them, for the tests of the swap."""

from host_runs import MODELS, as_host, exact, run

from vdcore.integrations.diffusers import swap_in
from vdcore.testing import error_ratio

# One of every kind of change: a whole model, motion modules, blends, processors with norms and rotations.
KINDS = ("Latte", "AnimateDiff", "SVD", "Wan", "HunyuanVideo", "CogVideoX", "LTX2.3")


def swapped(name, **kwargs):
    model = MODELS[name].model()
    return model, swap_in(model, **kwargs)


def check(model, name):
    ours = run(model, name)
    assert error_ratio(ours, exact(name), [as_host(name)]).worst <= 1


def state(model):
    return [(type(m), id(m.__dict__.get("processor")), len(m._forward_pre_hooks)) for m in model.modules()]
