"""Operators that go row by row, at sizes where work is cut into many parts and results are streamed past the caches."""

import pytest
import torch

import vdcore
from vdcore import QKNorm, Rope
from vdcore.testing import TORCH_FORMS, error_ratio


def qk_norm_rope(draw):
    angle = torch.linspace(0, 9, 16 * 128 * 36).reshape(16, 128, 36)
    norm, rope = QKNorm(draw(72), draw(72), "layer", q_bias=draw(72), k_bias=draw(72)), Rope(angle.cos(), angle.sin())
    q, k = draw(1, 16, 128, 16, 72), draw(1, 16, 128, 16, 72)
    return vdcore.qk_norm_rope, {"q": q, "k": k, "norm": norm, "rope": rope}


def modulate(draw):
    return vdcore.modulate, {"x": draw(2, 8, 257, 1152), "shift": draw(2, 8, 1152), "scale": draw(2, 1152)}


def gate_residual(draw):
    x, residual = draw(2, 8, 257, 1152), draw(2, 8, 257, 1152)
    return vdcore.gate_residual, {"residual": residual, "x": x, "gate": draw(2, 1152)}


def patchify(draw):
    return vdcore.patchify, {"video": draw(1, 4, 8, 46, 62), "weight": draw(1152, 4, 1, 2, 2), "bias": draw(1152)}


def unpatchify(draw):
    arguments = {"channels": 4, "patch": (1, 2, 2), "grid": (8, 23, 31)}
    return vdcore.unpatchify, {"tokens": draw(1, 8, 713, 1152), "weight": draw(16, 1152), "bias": draw(16), **arguments}


def run(make, dtype, function=None, arithmetic=None, **kwargs):
    """Outputs, and gradients, of the same numbers whatever runs them.

    Args:
        function: None: the operator itself.
        arithmetic: dtype to which the numbers of ``dtype`` are widened.
    """
    generator, leaves = torch.Generator().manual_seed(3), []

    def draw(*shape):
        x = torch.randn(shape, generator=generator).to(dtype).to(arithmetic or dtype)
        leaves.append(x.requires_grad_())
        return x

    operator, arguments = make(draw)
    outputs = (function or operator)(**arguments, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [torch.randn(y.shape, generator=generator).to(dtype).to(y.dtype) for y in outputs]
    return outputs, torch.autograd.grad(outputs, leaves, incoming)


MAKERS = [qk_norm_rope, modulate, gate_residual, patchify, unpatchify]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_tolerance(make, dtype):
    """Sums over many tokens too: vectors' and weights' gradients."""
    ours = run(make, dtype, backend="cpu")
    exact = run(make, dtype, arithmetic=torch.float64, backend="reference")
    forms = [run(make, dtype, form) for form in TORCH_FORMS[make.__name__].values()]
    for part, gradient in enumerate((False, True)):
        for i, x in enumerate(ours[part]):
            ratio = error_ratio(
                x.detach(), exact[part][i].detach(), [f[part][i].detach() for f in forms], gradient=gradient
            )
            assert ratio.worst <= 1, (i, "gradient" if gradient else "output", ratio)


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_same_bits_for_any_number_of_threads(make):
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outputs, gradients = run(make, torch.float32, backend="cpu")
            found.append([*outputs, *gradients])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
