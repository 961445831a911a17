"""Gated attention on Triton: temporal attention backward gives the gate's gradient too, whatever its shape."""

import pytest
import torch
from support import backends_of

import vdcore
from vdcore import FrameMask

pytestmark = pytest.mark.skipif("triton" not in backends_of("temporal_attention"), reason="needs triton")

GATES = {
    "a number": (),
    "heads": (4, 1),
    "channels": (16,),
    "heads' channels": (4, 16),
    "frames": (5, 1, 1, 1),
    "frames' channels": (5, 1, 1, 16),
    "tokens": (2, 1, 3, 1, 1),
    "all": (2, 5, 3, 4, 16),
}


def leaves(gate, T=5, G=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    spatial, temporal = ((draw(2, T, 3, 4, 16), draw(2, T, 3, G, 16), draw(2, T, 3, G, 16)) for _ in range(2))
    return spatial, temporal, draw(*gate)


def gradients(backend, spatial, temporal, gate, **more):
    out = vdcore.gated_attention(spatial, temporal, gate, backend=backend, **more)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(out, (*spatial, *temporal, gate), dout)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize(("mask", "G"), [(FrameMask.full(), 4), (FrameMask.causal(), 2)], ids=["full", "causal"])
def test_every_shape_of_a_gate(gate, mask, G):
    args = leaves(gate, G=G)
    more = {"mask": mask, "lengths": torch.tensor([5, 3])}
    for ours, theirs in zip(gradients("triton", *args, **more), gradients("reference", *args, **more)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_gate_that_is_expanded_has_a_gradient_of_its_own_size():
    spatial, temporal, gate = leaves((4, 1))
    args = (spatial, temporal, gate.detach().expand(2, 5, 3, 4, 16).requires_grad_())
    for ours, theirs in zip(gradients("triton", *args), gradients("reference", *args)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_more_frames_than_a_program_holds():
    spatial, temporal, gate = leaves((4, 1), T=130)
    for ours, theirs in zip(
        gradients("triton", spatial, temporal, gate), gradients("reference", spatial, temporal, gate)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def backward_kernels(arch, call):
    from vdcore_bench import aot

    op, build, _ = aot.CALLS[call]
    return [launch.kernel.__name__ for launch in aot._launches_of(op, build(), arch)[1]]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_backward_computes_no_result_again(arch):
    for call in ("gated, 16 x 72", "gated by channels, 24 x 128, T 28"):
        kernels = backward_kernels(arch, call)
        assert kernels.count("temporal_attention_bwd_kernel") == 1
        assert not {"temporal_attention_fwd_kernel", "gate_bwd_kernel"} & set(kernels)
    assert "gate_bwd_kernel" in backward_kernels(arch, "gated, 8 x 64, T 240")
