"""Peers: right where they run, a reason where they do not, and a judge who notices a wrong one."""

import math

import pytest
import torch
from small import every_op, tiny_job

from vdcore import FrameMask
from vdcore_bench.measure.judge import Judge, flat, gradients, incoming
from vdcore_bench.peers import ATTENTION, PEERS, names

JOBS = [
    *((op, {}) for op in every_op()),
    *((op, {"norm_rope": True}) for op in ATTENTION),
    *((op, {"mask": FrameMask(past=1, future=1, sink=1)}) for op in ("temporal_attention", "video_attention")),
    ("video_attention", {"mask": FrameMask(future=0, chunk=2), "workload": "self-forcing-1.3b"}),
    ("temporal_attention", {"batch": 2}),
]


def functions(job, compiled=False):
    for peer in PEERS:
        if job.op in peer.ops and not peer.slow_start and peer.why_not(job) is None:
            for variant, make in peer.variants(job).items():
                if compiled or "compiled" not in variant:
                    yield f"{peer.name} {variant}", make()


def judged(job, function, spoil=lambda y: y):
    tensors = job.tensors()
    leaves = [tensors[name].requires_grad_() for name in job.learned] if job.has_backward else []
    with torch.set_grad_enabled(job.has_backward):
        outputs = [spoil(y) for y in flat(function(**job.arguments(tensors)))]
    dout = incoming(outputs)
    found = dict(zip(job.learned, gradients(outputs, leaves, dout))) if leaves else {}
    return Judge(job, tensors).ratio(outputs, dout, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "kwargs"), JOBS, ids=str)
def test_every_peer_computes_the_same_as_the_reference(op, kwargs, dtype):
    batch = kwargs.get("batch", 1)
    kwargs = {key: value for key, value in kwargs.items() if key != "batch"}
    job = tiny_job(op, dtype=dtype, mode="fwd+bwd", **kwargs)
    if batch > 1:
        job = tiny_job(op, dtype=dtype, mode="fwd+bwd", shape=type(job.shape)(**{**job.shape.__dict__, "B": batch}))
    seen = 0
    for name, function in functions(job):
        # Which of PyTorch's forms errs least decides what is allowed; the others may err a few times as much.
        assert judged(job, function) < 8, name
        seen += 1
    assert seen >= (0 if op in ("unpatchify", "qk_norm_rope") else 1)


@pytest.mark.parametrize("op", ATTENTION)
def test_results_have_the_layout_of_ours(op):
    job = tiny_job(op)
    for name, function in functions(job):
        outputs = flat(function(**job.arguments(job.tensors())))
        assert tuple(tuple(y.shape) for y in outputs) == job.output_sizes(), name
        assert outputs[0].is_contiguous() or op == "video_attention", name


def test_a_wrong_result_is_noticed():
    """The control: without it, a judge who finds everything right would pass."""
    job = tiny_job("temporal_attention")
    (_, function), *_ = functions(job)
    assert judged(job, function) <= 1
    assert judged(job, function, lambda y: y * 1.01) > 10
    assert judged(job, function, lambda y: y.roll(1, 3)) > 100
    assert judged(job, function, lambda y: torch.full_like(y, math.nan)) == math.inf


def test_what_is_too_large_to_be_judged_is_said():
    job = tiny_job("video_attention")
    judge = Judge(job, job.tensors())
    judge.most = judge.need - 1
    assert judge.ratio([], [], {}) is None
    assert "no error" in judge.note


def test_a_wrong_gradient_is_noticed():
    job = tiny_job("temporal_attention", mode="fwd+bwd")
    (_, function), *_ = functions(job)
    tensors = job.tensors()
    leaves = [tensors[name].requires_grad_() for name in job.learned]
    outputs = flat(function(**job.arguments(tensors)))
    dout = incoming(outputs)
    (dx,) = gradients(outputs, leaves, dout)
    judge = Judge(job, tensors)
    assert judge.ratio(outputs, dout, {"qkv": dx}) <= 1
    assert judge.ratio(outputs, dout, {"qkv": 1.01 * dx}) > 10


@pytest.mark.parametrize("op", every_op())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_who_cannot_run_says_why(op, dtype):
    for peer in PEERS:
        if op in peer.ops:
            reason = peer.why_not(tiny_job(op, dtype=dtype))
            assert reason is None or len(reason) > 10, peer.name


def test_every_attention_operator_meets_every_serious_peer():
    for op in ATTENTION:
        there = {peer.name.partition("[")[0] for peer in PEERS if op in peer.ops}
        assert there >= {"naive", "sdpa", "flex", "flash-attn-2", "flash-attn-3", "xformers", "sageattention"}


def test_half_precision_peers_may_also_compute_in_float32():
    half = dict(functions(tiny_job("temporal_attention", dtype=torch.bfloat16)))
    assert "sdpa[flash] in float32" in half
    assert "sdpa[flash] in float32" not in dict(functions(tiny_job("temporal_attention")))


def test_names_are_what_the_command_line_takes():
    assert {"vdcore", "copy", "naive", "sdpa", "sdpa[flash]"} <= set(names())
