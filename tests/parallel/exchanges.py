"""Cases of switch, gather, shard and average_gradients, run by every rank of a world."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from judging import part_of
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from vdits import config

from vdcore import FrameMask
from vdcore.models import VDiT
from vdcore.parallel import Traffic, average_gradients, gather, part_sizes, shard, start_switch, switch, video_attention
from vdcore.parallel.gradients import total

AXES = {"frames": 1, "tokens": 2}
SIZES = ((6, 9), (5, 7), (2, 4), (1, 1), (7, 2), (0, 3))
WAYS = (("frames", "tokens"), ("tokens", "frames"))


def whole(T, S, *, batch=2, channels=(3,), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, T, S, *channels, generator=generator).to(dtype)


def switch_is_slices_of_the_whole(mesh):
    for T, S in SIZES:
        for batch, dtype in ((1, torch.float32), (2, torch.bfloat16), (0, torch.float32)):
            x = whole(T, S, batch=batch, channels=(2, 3), dtype=dtype)
            for source, target in WAYS:
                part = shard(x, mesh, source)
                assert torch.equal(part, part_of(x, mesh, AXES[source]))
                assert torch.equal(switch(part, mesh, (T, S), source, target), part_of(x, mesh, AXES[target]))
                assert torch.equal(gather(part, mesh, (T, S), source), x)


def switch_takes_any_strides(mesh):
    T, S = 5, 7
    x = whole(T, S, channels=(3, 4))
    packed = part_of(x, mesh, 1).contiguous()[..., 1, :]  # a slice of a packed projection
    turned = part_of(x[..., 1, :], mesh, 1).transpose(1, 2).contiguous().transpose(1, 2)
    for part in (packed, turned):
        assert torch.equal(switch(part, mesh, (T, S)), part_of(x[..., 1, :], mesh, 2))


def gradients_are_the_reverse_exchange(mesh):
    for (T, S), (source, target) in ((sizes, way) for sizes in SIZES for way in WAYS):
        x, weight = whole(T, S), whole(T, S, seed=1)
        part = part_of(x, mesh, AXES[source]).clone().requires_grad_()
        y = switch(part, mesh, (T, S), source, target)
        (y * part_of(weight, mesh, AXES[target])).sum().backward()
        assert torch.equal(part.grad, part_of(weight, mesh, AXES[source]))
        part.grad = None
        switch(part, mesh, (T, S), source, target).sum().backward()  # an expanded gradient
        assert torch.equal(part.grad, torch.ones_like(part))


def gather_sums_gradients_of_the_whole(mesh):
    for dtype in (torch.float32, torch.bfloat16):
        for T, S in SIZES:
            weights = [whole(T, S, seed=rank, dtype=dtype) for rank in range(mesh.size())]
            part = part_of(whole(T, S, dtype=dtype), mesh, 1).clone().requires_grad_()
            (gather(part, mesh, (T, S)) * weights[mesh.get_local_rank()]).sum().backward()
            expected = sum(w.float() for w in weights).to(dtype)
            assert torch.equal(part.grad, part_of(expected, mesh, 1))


def switch_is_dtensor_s_redistribute(mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard  # takes seconds

    T, S = 2 * mesh.size(), 3 * mesh.size()
    x = whole(T, S)
    theirs = DTensor.from_local(part_of(x, mesh, 1).contiguous(), mesh, [Shard(1)])
    assert torch.equal(switch(part_of(x, mesh, 1), mesh, (T, S)), theirs.redistribute(mesh, [Shard(2)]).to_local())
    assert torch.equal(gather(part_of(x, mesh, 1), mesh, (T, S)), theirs.redistribute(mesh, [Replicate()]).to_local())


def a_switch_can_be_under_way(mesh):
    T, S = 5, 7
    x = whole(T, S)
    part = part_of(x, mesh, 1).clone().requires_grad_()
    first, second = (start_switch(part * k, mesh, (T, S)) for k in (1, 2))
    between = (part * 3).sum()
    (second.finish().sum() + first.finish().sum() + between).backward()
    assert torch.equal(part.grad, torch.full_like(part, 6.0))


def one_message_each_and_counted_bytes(mesh):
    rank, N = mesh.get_local_rank(), mesh.size()
    T, S, B, C = 5, 7, 2, 3
    x = part_of(whole(T, S, batch=B, channels=(C,)), mesh, 1)
    with Traffic(rank) as traffic:
        switch(x, mesh, (T, S))
    others = S - part_sizes(S, N)[rank]
    assert dict(traffic.messages) == ({"all_to_all_single": 1} if N > 1 else {})
    assert traffic.bytes == 4 * B * C * part_sizes(T, N)[rank] * others


def wrong_arguments_say_what_is_wrong(mesh):
    x = part_of(whole(5, 7), mesh, 1)
    plane = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("data", "context"))
    for call, kind, words in (
        (lambda: switch(x[:, :, :6], mesh, (5, 7)), ValueError, r"switch: x must be the frames of rank \d of \d"),
        (lambda: switch(x, mesh, (50, 7)), ValueError, "switch: x must be"),
        (lambda: switch(x, mesh, (5, 7), "heads"), ValueError, "switch: source must be 'frames' or 'tokens'"),
        (lambda: switch(x, mesh, 5), ValueError, r"switch: sizes must be \(T, S\)"),
        (lambda: switch(x, plane, (5, 7)), ValueError, r"switch: mesh must be of one dimension.*data.*context"),
        (lambda: switch(x, None, (5, 7)), TypeError, "switch: mesh must be a torch.distributed DeviceMesh"),
        (lambda: shard(x.flatten(1), mesh), ValueError, r"shard: x must be \(B, T, S, ...\)"),
        (lambda: gather([1], mesh, (5, 7)), TypeError, "gather: x must be a tensor"),
    ):
        with pytest.raises(kind, match=words):
            call()
    first = DeviceMesh("cpu", [0])
    if mesh.get_local_rank() > 0:
        with pytest.raises(ValueError, match="switch: mesh must be one that this process is in"):
            switch(x, first, (5, 7))
    assert torch.equal(switch(x, plane["data"], (5, 7)), part_of(whole(5, 7), mesh, 2))


def tangents_are_refused_by_name(mesh):
    """Hazard 34: never a tangent that is silently zero."""
    if mesh.size() == 1:
        return
    x = part_of(whole(5, 7, channels=(4, 8)), mesh, 1)
    model = VDiT(config(text_width=None, classes=None), mesh=mesh)
    video = part_of(torch.randn(1, 3, 5, 6, 8), mesh, 2)
    calls = [
        ("switch", lambda x: switch(x, mesh, (5, 7))),
        ("switch", lambda x: start_switch(x, mesh, (5, 7)).finish()),
        ("gather", lambda x: gather(x, mesh, (5, 7))),
        ("total", lambda x: total(x, mesh)),
        *(("(switch|video_attention)", partial(attend, mesh, plan)) for plan in ("heads", "ring", "halo")),
    ]
    for name, call in calls:
        words = f"parallel.{name}: no tangents and no transforms of torch.func pass between ranks"
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded), forward_ad.dual_level(), pytest.raises(RuntimeError, match=words):
                call(forward_ad.make_dual(x, torch.ones_like(x)))
        with pytest.raises(RuntimeError, match=words):
            torch.func.jvp(call, (x,), (torch.ones_like(x),))
        with pytest.raises(RuntimeError, match=words):
            torch.func.grad(lambda x, call=call: call(x).sum())(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no tangents"):
        model(forward_ad.make_dual(video, torch.ones_like(video)), torch.ones(1), frames=5)


def attend(mesh, plan, x):
    return video_attention(x, x, x, mesh=mesh, frames=5, mask=FrameMask.window(2), plan=plan)


def gradients_are_averaged(mesh):
    rank, N = mesh.get_local_rank(), mesh.size()
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2) for name in ("used", "here", "nowhere", "low")})
    model["low"].bfloat16()
    for name in ("used", "low"):
        for p in model[name].parameters():
            p.grad = torch.full_like(p, rank + 1.0)
    if rank == 0:
        for p in model["here"].parameters():
            p.grad = torch.full_like(p, 6.0)
    with Traffic(rank) as traffic:
        average_gradients(model, mesh)
    # Which gradients there are, and those of both dtypes, in float32; 8 of 32 values are nowhere.
    assert traffic.bytes == sum(2 * 4 * n * (N - 1) // N for n in ((8, 16, 8) if N > 1 else ()))
    mean = (N + 1) / 2
    for name, expected in (("used", mean), ("low", mean), ("here", 6.0 / N)):
        for p in model[name].parameters():
            torch.testing.assert_close(p.grad, torch.full_like(p, expected))
    assert all(p.grad is None for p in model["nowhere"].parameters())


CASES = {
    f.__name__: f
    for f in (
        switch_is_slices_of_the_whole,
        switch_takes_any_strides,
        gradients_are_the_reverse_exchange,
        gather_sums_gradients_of_the_whole,
        a_switch_can_be_under_way,
        one_message_each_and_counted_bytes,
        wrong_arguments_say_what_is_wrong,
        tangents_are_refused_by_name,
        gradients_are_averaged,
    )
}
SLOW = {"switch_is_dtensor_s_redistribute": switch_is_dtensor_s_redistribute}
