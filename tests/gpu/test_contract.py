"""Hazards that need a GPU: sizes past 16 and 32 bits, graphs, streams, devices, races."""

from unittest import mock

import pytest
import torch

import vdcore
from vdcore import FrameMask
from vdcore.testing import cases_of, run

QKV = ("temporal_attention", "spatial_attention")


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)


def with_gradients(op, leaves, dout=None, **kwargs):
    out = getattr(vdcore, op)(*leaves, backend="triton", **kwargs)
    dout = torch.ones_like(out) if dout is None else dout
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("B,S,H", [(1, 65_537, 1), (3, 21_846, 2), (70_000, 1, 1), (1, 1, 70_000), (1, 70_001, 2)])
def test_more_than_65535_of_anything(B, S, H):
    """Hazards 1, 2: every sequence is right, the last one too."""
    leaves = [draw(B, 4, S, H, 16) for _ in range(3)]
    results = with_gradients("temporal_attention", leaves, mask=FrameMask.causal())
    for at in ((0, 0, 0), (B - 1, S - 1, H - 1), (B // 2, S // 2, H // 2)):
        b, s, h = (slice(i, i + 1) for i in at)
        one = [x[b, :, s, h].detach().float().requires_grad_() for x in leaves]
        out = vdcore.temporal_attention(*one, mask=FrameMask.causal(), backend="reference")
        expected = [out, *torch.autograd.grad(out, one, torch.ones_like(out))]
        for ours, theirs in zip(results, expected):
            torch.testing.assert_close(ours[b, :, s, h].float(), theirs, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("T", [32_769, 65_537])
def test_many_frames(T):
    """Hazard 12."""
    leaves = [draw(1, T, 1, 1, 16) for _ in range(3)]
    mask = FrameMask(past=3, future=0, sink=1)
    results = with_gradients("temporal_attention", leaves, mask=mask)
    keys = torch.cat([torch.tensor([0]), torch.arange(T - 11, T)]).cuda()
    one = [leaves[0][:, -8:], leaves[1][:, keys], leaves[2][:, keys]]
    one = [x.detach().float().requires_grad_() for x in one]
    out = vdcore.temporal_attention(*one, mask=mask, q_start=4, backend="reference")
    torch.testing.assert_close(results[0][:, -8:].float(), out, rtol=3e-2, atol=3e-2)
    (dq,) = torch.autograd.grad(out, one[:1], torch.ones_like(out))
    torch.testing.assert_close(results[1][:, -8:].float(), dq, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("op", QKV)
def test_offsets_past_31_bits(op):
    """Hazards 3, 4, 23: frames 2**31 elements apart; one far tensor for q, k, v and the incoming gradient."""
    far, shape = 2**31 + 64, (1, 3, 40, 2, 16)
    storage = torch.full((2 * far + 16_384,), torch.nan, device="cuda", dtype=torch.bfloat16)
    tensors = []
    for i in range(4):
        x = storage[i * 2048 :].as_strided(shape, (0, far, 32, 16, 1))
        tensors.append(x.copy_(torch.randn(shape, device="cuda")))
    results = []
    for move in (lambda x: x, torch.clone):
        leaves = [move(x).detach().requires_grad_() for x in tensors[:3]]
        results.append(with_gradients(op, leaves, move(tensors[3])))
    for apart, near in zip(*results):
        assert torch.equal(apart, near)


@pytest.mark.large
def test_more_than_2_31_elements():
    """Hazard 23: 299,521 rows x 56 heads x 128 channels."""
    q, k, v = (torch.randn(1, 2, 149_761, 56, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = vdcore.temporal_attention(q, k, v, backend="triton")
    last = [x[:, :, -1:].float() for x in (q, k, v)]
    expected = vdcore.temporal_attention(*last, backend="reference")
    torch.testing.assert_close(out[:, :, -1:].float(), expected, rtol=2e-2, atol=2e-2)


CAPTURED = cases_of(tag="plain") + cases_of(tag="norm_rope") + cases_of(tag="masked")


@pytest.mark.parametrize("case", CAPTURED, ids=str)
def test_cuda_graph(case):
    """Hazard 18: forward and backward captured, then replayed on other values after memory has moved on.

    Capturing fails if anything inside synchronises.
    """
    function = getattr(vdcore, case.op)
    inputs = case.inputs(torch.bfloat16, device="cuda", requires_grad=True)
    leaves = [x for x in inputs.leaves.values() if x.requires_grad]

    def step():
        outputs = function(**inputs.args, backend="triton")
        while isinstance(outputs, tuple) and isinstance(outputs[0], tuple):
            outputs = tuple(y for x in outputs for y in x)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.ndim > 3 or len(leaves) < 3]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = case.inputs(torch.bfloat16, device="cuda", seed=1)
    with torch.no_grad():
        for x, y in zip(inputs.leaves.values(), other.leaves.values()):
            x.copy_(y)
    ballast = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(16)]
    graph.replay()
    torch.cuda.synchronize()
    for ours, expected in zip(captured, step()):
        assert torch.equal(ours.nan_to_num(), expected.nan_to_num())
    del ballast


@pytest.mark.parametrize("op", QKV)
def test_side_stream(op):
    """Hazard 20: inputs that are still being written on the stream of the call."""
    shape = (1, 8, 128, 4, 64)
    source = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    expected = with_gradients(op, [x.clone().requires_grad_() for x in source])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [x.clone().requires_grad_() for x in source]
        results = with_gradients(op, late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


def bits(outcome):
    return [x.contiguous().view(torch.int16) for x in (*outcome.outputs, *outcome.gradients.values()) if x.ndim > 1]


@pytest.mark.parametrize("case", cases_of(tag="plain") + cases_of(tag="norm_rope") + cases_of(tag="long"), ids=str)
def test_a_hundred_repeats_give_the_same_bits(case):
    """Hazard 16."""
    inputs = case.inputs(torch.bfloat16, device="cuda", requires_grad=True)
    function = getattr(vdcore, case.op)
    first = bits(run(inputs, function, backend="triton"))
    for _ in range(100):
        again = bits(run(inputs, function, backend="triton"))
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_the_control_of_repeats_fails():
    """Atomic sums in no order change bits: the comparison above would see it."""
    values = torch.randn(2_000_000, device="cuda")
    place = torch.zeros(len(values), dtype=torch.int64, device="cuda")
    sums = {torch.zeros(1, device="cuda").index_add_(0, place, values).item() for _ in range(50)}
    assert len(sums) > 1


def test_device_guard():
    """Hazard 5: kernels are launched on the device of their tensors, whatever the current one is."""
    from vdcore_kernels.core import launch

    q, k, v = (draw(1, 4, 8, 2, 16) for _ in range(3))
    with mock.patch.object(launch.torch.cuda, "device_of", wraps=torch.cuda.device_of) as guard:
        vdcore.temporal_attention(q, k, v, backend="triton")
    assert guard.called and all(call.args[0].device == q.device for call in guard.call_args_list)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", QKV)
def test_second_device(op):
    leaves = [torch.randn(1, 8, 40, 2, 64, device="cuda:1", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    with torch.cuda.device(0):
        results = with_gradients(op, leaves)
    same = [x.detach().to("cuda:0").requires_grad_() for x in leaves]
    assert all(torch.equal(a.to("cuda:0"), b) for a, b in zip(results, with_gradients(op, same)))


def test_no_host_synchronisation():
    """An operator only enqueues work."""
    leaves = [draw(2, 8, 128, 4, 64) for _ in range(3)]
    lengths = torch.tensor([8, 5], device="cuda")
    for op in ("temporal_attention", "video_attention"):
        with_gradients(op, leaves, mask=FrameMask.window(2), lengths=lengths)  # compiles, which may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for op in ("temporal_attention", "video_attention"):
            with_gradients(op, leaves, mask=FrameMask.window(2), lengths=lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
