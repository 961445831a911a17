"""Cases of VDiT over a mesh, run by every rank of a world: outputs and gradients beside one process."""

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from judging import check_all, gradients_of, part_of, some
from vdits import config, doubled, in_plain_torch, model_of, to_double

from vdcore import FrameMask, GridMask
from vdcore.models import DepthControl, VDiT
from vdcore.ops import spatial_attention
from vdcore.parallel import ExchangeError, Traffic, average_gradients, explain, part_sizes
from vdcore.parallel.switch import Move

PER_FRAME = {"timestep": 1, "text": 1, "text_lengths": 1, "positions": 0}


def on_mesh(model, mesh, plan=None):
    shared = VDiT(model.config, mesh=mesh, plan=plan)
    shared.load_state_dict(model.state_dict())
    return shared.to(model.patch.weight.dtype)


def draw(given, T, *, B=2, rows=3, columns=4, per_frame=False, dtype=torch.float32):
    """Video, timestep and keywords of the whole; with ``per_frame`` everything may differ from frame to frame."""
    generator = torch.Generator().manual_seed(3)
    pt, ph, pw = given.patch

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    keywords = {"label": torch.tensor([1, 4])[:B]}
    frames = (T,) if per_frame else ()
    timestep = torch.rand(B, *frames, generator=generator) * 1000
    keywords["text"] = normal(B, *frames, 3, 10)
    lengths = torch.tensor([3, 2])[:B]
    keywords["text_lengths"] = lengths[:, None].expand(B, T) if per_frame else lengths
    if per_frame:
        keywords["positions"] = torch.arange(T, dtype=torch.float64) * 1.5
    return normal(B, given.in_channels, T * pt, rows * ph, columns * pw), timestep, keywords


def run(model, video, timestep, keywords, incoming, **more):
    """Output, gradients of the inputs, and of the parameters, by name."""
    inputs = {"video": video.clone().requires_grad_(), "text": keywords["text"].clone().requires_grad_()}
    out = model(inputs["video"], timestep, **{**keywords, "text": inputs["text"]}, **more)
    parameters = dict(model.named_parameters())
    found = gradients_of({**inputs, **parameters}, out, incoming)
    return {"out": out.detach()}, {n: found[n] for n in inputs}, {n: found[n] for n in parameters}


def compare(mesh, given, T, *, plan=None, per_frame=False, dtype=torch.float32, frames=True):
    torch.manual_seed(0)
    model = model_of(given).to(dtype)
    video, timestep, keywords = draw(given, T, per_frame=per_frame, dtype=dtype)
    incoming = torch.randn(video.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    exact = run(doubled(model), video.double(), timestep, {n: to_double(x) for n, x in keywords.items()}, incoming)
    forms = []
    for name in ("naive", "sdpa"):
        with in_plain_torch(name):
            forms.append(run(model, video, timestep, keywords, incoming))

    pt = given.patch[0]
    tokens = part_sizes(T, mesh.size())

    def own_video(x):
        return x.split([n * pt for n in tokens], 2)[mesh.get_local_rank()]

    def own(name, x):
        return part_of(x, mesh, PER_FRAME[name]) if per_frame and name in PER_FRAME else x

    shared = on_mesh(model, mesh, plan)
    mine = {name: own(name, x) for name, x in keywords.items()}
    more = {"frames": T * pt} if frames else {}
    out, inputs, parameters = run(
        shared, own_video(video), own("timestep", timestep), mine, own_video(incoming), **more
    )
    for name, p in shared.named_parameters():
        p.grad = parameters[name]
    average_gradients(shared, mesh)
    parameters = {name: p.grad for name, p in shared.named_parameters()}
    if not per_frame:  # the same text on every rank, each with its share
        text = inputs["text"].float()
        torch.distributed.all_reduce(text, group=mesh.get_group())
        inputs["text"] = text.to(dtype)

    def cut(found):
        return (
            {"out": own_video(found[0]["out"])},
            {"video": own_video(found[1]["video"]), "text": own("text", found[1]["text"])},
            found[2],
        )

    wanted, others = cut(exact), [cut(form) for form in forms]
    for i, ours in enumerate((out, inputs, parameters)):
        check_all(ours, wanted[i], [form[i] for form in others], gradient=i > 0)
    return out, parameters


MIXED = FrameMask(past=1, future=0, chunk=2, sink=1)


def factorized_and_gated_models(mesh):
    for i, attention in some(enumerate(("factorized", "spatial", "alternating", "gated")), 3):
        given = config(attention=attention, position=("rope", "sincos+rope")[i % 2], qk_norm=True, mask=MIXED)
        compare(mesh, given, 5, per_frame=i % 2 == 0)


def sincos_tokens_and_single_modulation(mesh):
    for attention in some(("alternating", "gated")):
        compare(mesh, config(attention=attention, modulation="single", temporal_cross=True), 4, per_frame=True)


def full_attention_by_every_plan(mesh):
    for plan in some(("ring", "heads", "halo", None)):
        given = config(attention="full", position="rope", qk_norm=True, mask=MIXED if plan != "heads" else FrameMask())
        compare(mesh, given, 5, plan=plan)


def fewer_frames_than_ranks(mesh):
    if mesh.size() == 1:
        return
    for attention in some(("factorized", "gated", "full")):
        compare(mesh, config(attention=attention, depth=1), mesh.size() - 1)


def tokens_of_several_frames_and_sizes_exchanged(mesh):
    compare(mesh, config(attention="factorized", patch=(2, 1, 2), depth=1), 5, per_frame=True, frames=False)


def temporal_attention_on_a_halo(mesh):
    given = config(attention="factorized", position="rope", qk_norm=True, mask=FrameMask.window(1), kv_heads=1)
    for plan in some(("halo", "switch")):
        compare(mesh, given, 7, plan=plan, per_frame=True)


def half_precision(mesh):
    for attention in some(("full", "factorized")):
        compare(mesh, config(attention=attention, depth=1, mask=MIXED), 5, dtype=torch.bfloat16)


def checkpointing_changes_no_bit(mesh):
    for attention, plan in (("factorized", None), ("gated", None), ("full", "ring"), ("full", "halo")):
        given = config(attention=attention)
        kept, again = (compare(mesh, replace(given, checkpoint=c), 5, plan=plan) for c in (False, True))
        for a, b in zip(kept, again):
            assert all(torch.equal(a[name], b[name]) for name in a)


def ranks_send_what_the_switch_plan_says(mesh):
    rank, T, depth = mesh.get_local_rank(), 7, 3
    for attention, pairs in (("factorized", depth), ("gated", depth), ("alternating", 1)):
        given = config(attention=attention, depth=depth, text_width=None, classes=None)
        model, (video, timestep, _) = on_mesh(model_of(given), mesh), draw(given, T)
        with Traffic(rank) as traffic, torch.no_grad():
            model(part_of(video, mesh, 2), timestep, frames=T)
        shape = 2, T, 12, given.heads, given.head_dim
        plan = next(p for p in explain(shape, mesh.size(), itemsize=4, op="temporal_attention") if p.name == "switch")
        assert traffic.bytes == pairs * plan.sent[rank]
        assert sum(traffic.messages.values()) == (2 * pairs if mesh.size() > 1 else 0)


def both_switches_of_a_gate_are_on_their_way_while_spatial_attention_computes(mesh):
    if mesh.size() == 1:
        return
    events = []

    def told(name, function):
        def tells(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        return tells

    def spatial(*args, **kwargs):
        events.append("spatial")
        out = spatial_attention(*args, **kwargs)
        out.register_hook(lambda grad: events.append("spatial"))
        return out

    given = config(attention="gated", depth=1, text_width=None, classes=None)
    model, (video, timestep, _) = on_mesh(model_of(given), mesh), draw(given, 5)
    linear = told("linear", torch.nn.functional.linear)
    with (
        mock.patch.object(Move, "start", told("start", Move.start)),
        mock.patch.object(Move, "finish", told("finish", Move.finish)),
        mock.patch.multiple("vdcore.models.attention", spatial_attention=spatial),
        mock.patch("vdcore.models.attention.F.linear", linear),
    ):
        out = model(part_of(video, mesh, 2), timestep, frames=5)
        forward, events[:] = [*events], []
        out.sum().backward()
    first, last = forward.index("start"), len(forward) - forward[::-1].index("finish")
    assert [e for e in forward[first:last] if e != "linear"] == ["start", "finish", "start", "spatial", "finish"]
    assert forward[first + 1] == "linear"  # the spatial projection, between the first start and its finish
    assert events == ["start", "spatial", "finish", "start", "finish"]


def depth_control(mesh):
    torch.manual_seed(0)
    given = config(text_width=None, classes=None)
    model = model_of(given)
    control = DepthControl(model, 1)
    for p in control.parameters():
        torch.nn.init.normal_(p, std=0.15)
    video, timestep, _ = draw(given, 5)
    depth = torch.randn(2, 1, *video.shape[2:])
    model(video, timestep, control=control(video, timestep, depth)).sum().backward()
    shared = on_mesh(model, mesh)
    theirs = DepthControl(shared, 1)
    theirs.load_state_dict(control.state_dict())
    part, own = (part_of(x, mesh, 2) for x in (video, depth))
    shared(part, timestep, control=theirs(part, timestep, own, frames=5), frames=5).sum().backward()
    for ours, one in ((shared, model), (theirs, control)):
        average_gradients(ours, mesh)
        for p, expected in zip(ours.parameters(), one.parameters()):
            if expected.grad is not None:
                torch.testing.assert_close(p.grad, expected.grad, rtol=1e-3, atol=1e-4)


def wrong_arguments_say_what_is_wrong(mesh):
    if mesh.size() == 1:
        return
    given = config(text_width=None, classes=None)
    model, (video, timestep, _) = VDiT(given, mesh=mesh), draw(given, 5)
    part = part_of(video, mesh, 2)
    for arguments, words in (
        ({"frames": 50}, r"VDiT: video must be with the \d+ of 50 frames that rank \d of \d holds, got"),
        ({"frames": 5, "cache": object()}, "VDiT: cache must be None with a mesh"),
    ):
        with pytest.raises(ValueError, match=words):
            model(part, timestep, **arguments)
    with pytest.raises(ValueError, match="VDiT: plan must be switch, halo or None, got 'ring'"):
        VDiT(given, mesh=mesh, plan="ring")
    for mask in (GridMask(columns=1), ((2, FrameMask()),)):
        with pytest.raises(ValueError, match=r"VDiT: mesh must be None or of one rank .* one FrameMask, got \d ranks"):
            VDiT(config(attention="full", mask=mask), mesh=mesh)
    with pytest.raises(ValueError, match=r"VDiT: video must be with .* frames by rank"):
        model(video[:, :, : 1 + 2 * mesh.get_local_rank()], timestep)
    other = 1 + (mesh.get_local_rank() != 1)  # rank 1 has one sample, the others have two
    words = (
        r"VDiT: video must be the same on all ranks but for its frames, got float32 \(2, .* and .* \(1, .* on rank 1"
    )
    with pytest.raises(ExchangeError, match=words):
        model(part[:other], timestep)
    with pytest.raises(
        ExchangeError, match=r"VDiT: timestep must be the same .*, got float32 .* and float64 .* on rank 1"
    ):
        model(part, timestep.double() if mesh.get_local_rank() == 1 else timestep)
    recorded = torch.set_grad_enabled(mesh.get_local_rank() != 1)
    with recorded, pytest.raises(ExchangeError, match=r"VDiT: gradients are recorded by all ranks but \[1\]"):
        model(part, timestep)
    copy.deepcopy(model)
    first = mesh.get_local_rank() == 0
    masked = VDiT(config(attention="full", mask=FrameMask.causal() if first else FrameMask()), mesh=mesh)
    with pytest.raises(ExchangeError, match=r"VDiT: config must be the same on all ranks, got another one on \[1"):
        masked(part, timestep)
    model.requires_grad_(False)
    with pytest.raises(ExchangeError, match=r"VDiT: gradients are recorded by all ranks but \[1"):
        model(part.requires_grad_(first), timestep)


CASES = {
    f.__name__: f
    for f in (
        factorized_and_gated_models,
        sincos_tokens_and_single_modulation,
        full_attention_by_every_plan,
        fewer_frames_than_ranks,
        tokens_of_several_frames_and_sizes_exchanged,
        temporal_attention_on_a_halo,
        half_precision,
        ranks_send_what_the_switch_plan_says,
        both_switches_of_a_gate_are_on_their_way_while_spatial_attention_computes,
        depth_control,
        wrong_arguments_say_what_is_wrong,
    )
}
SLOW = {"checkpointing_changes_no_bit": checkpointing_changes_no_bit}
