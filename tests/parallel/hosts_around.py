"""Cases of diffusers' models on a mesh beside what else wraps a model, and of what is refused. On four ranks."""

import copy
import logging
import os
import pickle
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from judging import part_of
from torch.distributed.device_mesh import init_device_mesh

from vdcore import FrameMask, GridMask
from vdcore.parallel import ExchangeError, Traffic, average_gradients, explain


def tiny(name):
    os.environ["ZOO_FRAMES"] = "7"
    logging.disable(logging.WARNING)
    import hosts_on_ranks

    return hosts_on_ranks.models()[name]


def swap_in(*args, **kwargs):
    from vdcore.integrations.diffusers import swap_in

    return swap_in(*args, **kwargs)


def of_sample(arguments, i):
    """One of two samples; an AnimateDiff text has a row for each frame."""

    def cut(x):
        if not isinstance(x, torch.Tensor) or x.ndim == 0 or x.shape[0] % 2:
            return x
        return x.chunk(2)[i]

    return {name: cut(x) for name, x in arguments.items() if name != "image_rotary_emb"} | {
        name: x for name, x in arguments.items() if name == "image_rotary_emb"
    }


def two_dimensional(name, wrap):
    """Two clips by data, their frames by context: every gradient that of one process on both clips."""
    plane = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    data = plane["data"].get_local_rank()
    model, host = tiny(name).model(), tiny(name).model()
    arguments = tiny(name).arguments()
    outs = [host(**of_sample(arguments, i), return_dict=False)[0] for i in range(2)]
    target = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(5))
    (sum(((out - target) ** 2).mean() for out in outs) / 2).backward()
    swap_in(model, mesh=plane["context"])
    wrapped = wrap(model)
    out = wrapped(**of_sample(arguments, data), return_dict=False)[0]
    torch.testing.assert_close(out, outs[data], rtol=1e-4, atol=1e-5)
    ((out - target) ** 2).mean().backward()
    found = dict(model.named_parameters())
    largest = max(p.grad.abs().max() for p in host.parameters() if p.grad is not None)
    for key, p in host.named_parameters():
        grad = found[key].grad
        if p.grad is not None:
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-5 * float(largest))


def ddp(mesh):
    from torch.nn.parallel import DistributedDataParallel

    for name in ("Wan", "SVD", "AnimateDiff"):
        two_dimensional(name, lambda model: DistributedDataParallel(model, find_unused_parameters=True))


def fsdp2(mesh):
    from torch.distributed.fsdp import fully_shard

    def wrap(model):
        everybody = init_device_mesh("cpu", (4,))
        for block in getattr(model, "blocks", None) or model.transformer_blocks:
            fully_shard(block, mesh=everybody)
        return fully_shard(model, mesh=everybody)

    for name in ("Wan", "Latte", "CogVideoX"):
        two_dimensional(name, wrap)


def compiled_blocks(mesh):
    """The exchanges of attention are in the graph of a block. On two ranks: compiling takes time."""
    for name, mask in (("Wan", FrameMask.window(1)), ("CogVideoX", FrameMask.causal())):
        torch._dynamo.reset()
        model, arguments = tiny(name).model(), tiny(name).arguments()
        swap_in(model, mask=mask, mesh=mesh, plan="halo")
        with torch.no_grad():
            expected = model(**arguments, return_dict=False)[0]
        for block in getattr(model, "blocks", None) or model.transformer_blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        found = model(**arguments, return_dict=False)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found.square().sum().backward()
        ours = [p.grad for p in model.parameters()]
        average_gradients(model, mesh)
        host = tiny(name).model()
        swap_in(host, mask=mask)
        host(**arguments, return_dict=False)[0].square().sum().backward()
        for grad, p in zip(ours, host.parameters()):
            torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()) + 1e-5)
        if name == "Wan":  # another clip, of which rank 0 has as many frames
            clip = arguments["hidden_states"]
            longer = {**arguments, "hidden_states": torch.cat((clip, clip[:, :, :1]), 2)}
            with torch.no_grad():
                for given in (longer, arguments, longer):
                    found, expected = (m(**given, return_dict=False)[0] for m in (model, host))
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def diffusers_own_configuration(mesh):
    """Its ContextParallelConfig, with a mesh of its own or of the user's, and that mesh itself."""
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    model, arguments = tiny("Wan").model(), tiny("Wan").arguments()
    with torch.no_grad():
        expected = model(**arguments, return_dict=False)[0]
    plane = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    with_data = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("data", "ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=4)
    for given, ranks in (
        (config, 4),
        (ParallelConfig(context_parallel_config=ContextParallelConfig(ring_degree=2, ulysses_degree=2)), 4),
        (ContextParallelConfig(ulysses_degree=2, mesh=with_data), 2),
        (plane, 4),
    ):
        swapped = copy.deepcopy(model)
        report = swap_in(swapped, mesh=given)
        assert not report.left, report
        with Traffic(dist.get_rank()) as traffic, torch.no_grad():
            found = swapped(**arguments, return_dict=False)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert traffic.bytes
        assert {m.processor.clip.ranks.peers.ranks for m in swapped.modules() if hasattr(m, "processor")} >= {ranks}
    with pytest.raises(ValueError, match=r"swap_in: mesh must be given in the configuration for .* = 2 of 4 processes"):
        swap_in(model, mesh=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(ValueError, match="swap_in: mesh must be of one dimension"):
        swap_in(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context")))
    with pytest.raises(TypeError, match=r"swap_in: mesh must be a torch.distributed DeviceMesh, got int"):
        swap_in(model, mesh=4)


def ranks_send_what_the_plans_say(mesh):
    """Counted bytes, forward: of Latte two switches a layer, of Wan each layer's plan; a gather of the result."""
    rank = dist.get_rank()
    for name in ("Latte", "Wan"):
        model, arguments = tiny(name).model(), tiny(name).arguments()
        swap_in(model, mesh=mesh)
        with Traffic(rank) as traffic, torch.no_grad():
            model(**arguments)
        op = "temporal_attention" if name == "Latte" else "video_attention"
        plans = explain((2, 7, 6, 2, 12), mesh.size(), itemsize=4, op=op)
        plan = next(p for p in plans if p.name == ("switch" if name == "Latte" else plans[0].name))
        assert traffic.sent["all_to_all_single"] == 2 * plan.sent[rank], name


def a_pipeline(mesh):
    """A pipeline steps on the whole on every rank; what has no clip to share says so in the report."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    class Latents(WanPipeline):
        def __init__(self, transformer, scheduler):
            super(WanPipeline, self).__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

    def sample(pipeline):
        pipeline.scheduler.set_timesteps(3)
        x = tiny("Wan").arguments()
        latents = x["hidden_states"]
        for t in pipeline.scheduler.timesteps:
            with torch.no_grad():
                v = pipeline.transformer(latents, t.expand(2), x["encoder_hidden_states"], return_dict=False)[0]
            latents = pipeline.scheduler.step(v, t, latents, return_dict=False)[0]
        return latents

    pipeline = Latents(tiny("Wan").model(), FlowMatchEulerDiscreteScheduler())
    expected = sample(pipeline)
    report = swap_in(pipeline, mesh=mesh)
    assert report.served
    torch.testing.assert_close(sample(pipeline), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="swap_in: parts must be False for a pipeline"):
        swap_in(pipeline, mesh=mesh, parts=True)


def what_is_not_served_is_left_or_refused(mesh):
    model = tiny("HunyuanVideo").model()
    with pytest.warns(UserWarning, match="nothing is served"):
        report = swap_in(model, mesh=mesh)
    assert [entry.what for entry in report.left] == [
        "not served under a mesh yet: what mixes frames in it has not been looked through"
    ]
    with pytest.raises(ValueError, match="swap_in: parts must be False for HunyuanVideoTransformer3DModel: not served"):
        swap_in(model, mesh=mesh, parts=True)
    for wrong, words in (
        ({"parts": True}, "parts must be left out without a mesh"),
        ({"plan": "ring"}, "plan must be left out without a mesh"),
        ({"mesh": mesh, "plan": "switch"}, "plan must be one of heads, halo, ring, or None, got 'switch'"),
        ({"mesh": mesh, "mask": GridMask(columns=1)}, "mask must be a FrameMask, or a dict of these, on a mesh, got"),
        ({"mesh": mesh, "mask": ((2, FrameMask()),)}, "mask must be a FrameMask, or a dict of these, on a mesh, got"),
    ):
        with pytest.raises(ValueError, match=words):
            swap_in(model, **wrong)
    wan, arguments = tiny("Wan").model(), tiny("Wan").arguments()
    swap_in(wan, mesh=mesh)
    few = {**arguments, "hidden_states": arguments["hidden_states"][:, :, :3]}
    with pytest.raises(ValueError, match="hidden_states must be of at least 4 token frames, one for each rank, got 3"):
        wan(**few)
    other = {**arguments, "timestep": arguments["timestep"][: 1 if dist.get_rank() == 2 else 2]}
    with pytest.raises(ExchangeError, match=r"timestep must be the same .* got int64 \(2,\) on rank 0 .* on rank 2"):
        wan(**other)
    first = dist.get_rank() == 0
    for name, given in (
        ("mask", {"mask": FrameMask.causal() if first else None}),
        ("plan", {"plan": "heads" if first else "ring"}),
        ("dense_layers", {"mask": FrameMask.causal(), "dense_layers": [0] if first else []}),
        (r"report.dense\(\)", {"mask": FrameMask.causal()}),
    ):
        report = swap_in(wan, mesh=mesh, **given)
        within = report.dense() if first and "dense" in name and "layers" not in name else nullcontext()
        with within, pytest.raises(ExchangeError, match=rf"{name} must be the same on all ranks, got another one on"):
            wan(**arguments)
    swap_in(wan, mesh=mesh)
    with pytest.raises(RuntimeError, match="attention over 42 tokens under a mesh of 4 ranks, outside of a call"):
        wan.blocks[0].attn1(torch.randn(2, 42, 24), None, None, None)
    wan.train()
    wan.blocks[0].ffn.net[1].p = 0.1
    with pytest.raises(ValueError, match="dropout must be 0 in training on a mesh"):
        wan(**arguments)


def copies_and_back(mesh):
    from vdcore.integrations.diffusers import swap_out
    from vdcore.integrations.swap import make_all

    for name in ("Wan", "SVD", "Latte"):
        model, arguments = tiny(name).model(), tiny(name).arguments()
        with torch.no_grad():
            expected = model(**arguments, return_dict=False)[0]
            before = [type(m) for m in model.modules()]
            report = swap_in(model, mesh=mesh)
            shared = model(**arguments, return_dict=False)[0]
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(twin(**arguments, return_dict=False)[0], shared)
            assert report.check(model, **arguments).relative < 1e-4
            swap_in(model)  # without a mesh: the whole on every rank
            with Traffic(dist.get_rank()) as traffic:
                model(**arguments)
            assert not traffic.bytes
            swap_in(model, mesh=mesh)
            failing = mock.patch("vdcore.integrations.swap.make_all", side_effect=[RuntimeError("no"), mock.DEFAULT])
            failing.kwargs["wraps"] = make_all
            with failing, pytest.raises(RuntimeError, match="no"):  # the swap before is made again
                swap_in(model, mesh=mesh, plan="ring")
            assert torch.equal(model(**arguments, return_dict=False)[0], shared)
            swap_out(model)
            assert [type(m) for m in model.modules()] == before
            assert torch.equal(model(**arguments, return_dict=False)[0], expected)


def a_loss_of_parts(mesh):
    """Frames in, frames out: what a training loop writes when no rank can hold the whole."""
    model, host = tiny("Latte").model(), tiny("Latte").model()
    arguments = tiny("Latte").arguments()
    whole = host(**arguments, return_dict=False)[0]
    whole.square().mean().backward()
    swap_in(model, mesh=mesh, parts=True)
    mine = {**arguments, "hidden_states": part_of(arguments["hidden_states"], mesh, 2)}
    out = model(**mine).sample
    torch.testing.assert_close(out, part_of(whole, mesh, 2), rtol=1e-4, atol=1e-5)
    (out.square().sum() / whole.numel()).backward()
    average_gradients(model, mesh)
    for p, expected in zip(model.parameters(), host.parameters()):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="check: the host has no way to run a rank's part"):
        swap_in(model, mesh=mesh, parts=True).check(model, **mine)


CASES = {
    f.__name__: f
    for f in (
        diffusers_own_configuration,
        ranks_send_what_the_plans_say,
        a_pipeline,
        what_is_not_served_is_left_or_refused,
        copies_and_back,
        a_loss_of_parts,
        ddp,
        fsdp2,
    )
}
SLOW: dict = {}
