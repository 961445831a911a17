"""Jobs: inputs that the public functions take, and the work that rows count."""

import math
from dataclasses import replace

import pytest
import torch
from small import TINY, every_op, tiny_job

import vdcore
from vdcore import FrameMask
from vdcore_bench.jobs import TAKES_NORM_ROPE
from vdcore_bench.measure.judge import flat


@pytest.mark.parametrize("norm_rope", [False, True])
@pytest.mark.parametrize("op", every_op())
def test_the_public_function_takes_the_arguments(op, norm_rope):
    if norm_rope and op not in TAKES_NORM_ROPE:
        pytest.skip("it takes neither norm nor rope")
    job = tiny_job(op, norm_rope=norm_rope)
    outputs = flat(getattr(vdcore, op)(**job.arguments(job.tensors())))
    assert tuple(tuple(y.shape) for y in outputs) == job.output_sizes()


@pytest.mark.parametrize("op", every_op())
def test_every_leaf_gets_a_gradient(op):
    job = tiny_job(op, mode="fwd+bwd", norm_rope=op in TAKES_NORM_ROPE)
    tensors = job.tensors()
    leaves = [tensors[name].requires_grad_() for name in job.learned]
    outputs = flat(getattr(vdcore, op)(**job.arguments(tensors)))
    found = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)
    used = [name for name, dx in zip(job.learned, found) if dx is not None]
    assert used == list(job.learned)


@pytest.mark.parametrize("op", ["spatial_attention", "temporal_attention", "video_attention", "gated_attention"])
def test_queries_are_strided_views_of_a_projection(op):
    job = tiny_job(op)
    q, k, v = job.qkv(job.tensors(), "spatial_" if op == "gated_attention" else "")
    assert not q.is_contiguous() and q.stride(-1) == 1
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


def test_floating_point_operations_of_attention_are_those_of_visible_pairs():
    job = tiny_job("video_attention", "wan2.2-5b-704p")
    n = TINY.T * TINY.S
    assert job.flops() == 4 * TINY.D * TINY.H * n * n
    assert replace(job, mode="bwd").flops() == 10 * TINY.D * TINY.H * n * n
    assert replace(job, mode="fwd+bwd").flops() == 14 * TINY.D * TINY.H * n * n
    causal = replace(job, mask=FrameMask.causal())
    assert causal.flops() == pytest.approx(job.flops() * (TINY.T + 1) / (2 * TINY.T))


def test_traffic_of_temporal_attention_is_four_tensors_forward():
    job = tiny_job("temporal_attention")
    one = math.prod((TINY.T, TINY.S, TINY.H, TINY.D)) * 4
    assert job.traffic() == 4 * one  # q, k, v, out
    assert replace(job, mode="bwd").traffic() == 8 * one  # q, k, v, out, dout; dq, dk, dv
    assert replace(job, dtype=torch.bfloat16).traffic() == 2 * one


def test_an_operator_that_a_workload_has_not_is_an_error_with_its_reason():
    with pytest.raises(ValueError, match="svd-xt-level2 has no patchify"):
        tiny_job("patchify", "svd-xt-level2")
