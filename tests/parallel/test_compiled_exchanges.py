"""Graphs that the compiler makes for each rank: their exchanges meet, whatever a rank needs of them.

An exchange that brings a rank nothing, or takes nothing from it, is no dead code: another rank waits for it. The graphs
are made one after another in this process, on a process group that sends nothing.
"""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from judging import part_of
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from vdits import config

from vdcore import FrameMask
from vdcore.models import VDiT
from vdcore.parallel import gather, switch, video_attention

ALL = FrameMask()
PARTITIONS = {"least memory": min_cut_rematerialization_partition, "all saved": default_partition}


@contextmanager
def process(rank, ranks):
    """A mesh as one of its processes sees it."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def exchanges(graph):
    """In order: what kind, and the elements to and from every rank."""
    found = []
    for node in graph.nodes:
        if getattr(node.target, "namespace", "") != "_c10d_functional":
            continue
        name = node.target._opname
        if name == "all_to_all_single":
            _, received, sent, _ = node.args
            found.append((name, tuple(sent), tuple(received)))
        elif name != "wait_tensor":
            n = node.args[0].meta["val"].numel()
            found.append((name, (n,) * dist.get_world_size(), (n,) * dist.get_world_size()))
    return found


def not_run(graph, _):
    """In the place of a graph: results of its shapes."""
    (outputs,) = graph.graph.output_node().args
    values = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in outputs]
    return make_boxed_func(
        lambda *_: [torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else x for x in values]
    )


def graphs_of(function, ranks, partition=min_cut_rematerialization_partition):
    """By rank, the exchanges of every graph, forward and backward in turn; ``function(mesh)`` is compiled and run."""
    found = []
    for rank in range(ranks):
        graphs = []

        def cut(*args, graphs=graphs, **kwargs):
            pair = partition(*args, **kwargs)
            graphs.append(tuple(exchanges(module.graph) for module in pair))
            return pair

        torch._dynamo.reset()
        with process(rank, ranks) as mesh:
            function(mesh, aot_autograd(fw_compiler=not_run, partition_fn=cut))
        found.append(graphs)
    return found


def assert_they_meet(found):
    """On all ranks as many graphs with as many exchanges, of which each sends what the other expects."""
    assert len({len(graphs) for graphs in found}) == 1 and found[0]
    for graphs in zip(*found):
        for of_ranks in zip(*graphs):  # forward, backward
            assert len({len(each) for each in of_ranks}) == 1, of_ranks
            for each in zip(*of_ranks):
                assert len({name for name, _, _ in each}) == 1, each
                for i, (_, sent, _) in enumerate(each):
                    assert [n for j, n in enumerate(sent) if j != i] == [
                        received[i] for j, (_, _, received) in enumerate(each) if j != i
                    ], each


def attend(mesh, backend, plan="halo", mask=ALL, T=7, S=3, text=0, wanted="qkv"):
    q, k, v = (part_of(torch.randn(1, T, S, 6, 8), mesh, 1).requires_grad_(name in wanted) for name in "qkv")
    words = tuple(torch.randn(1, text, 6, 8, requires_grad=True) for _ in range(3)) if text else None

    def function(q, k, v, words):
        # What stands between exchanges is saved, or computed again.
        return video_attention(q.sin(), k.sin(), v.sin(), mesh=mesh, frames=T, mask=mask, plan=plan, text=words)

    torch.compile(function, backend=backend, fullgraph=True)(q, k, v, words)


def there_and_back(mesh, backend, T=7, S=5):
    def function(x):
        tokens = switch(x.sin(), mesh, (T, S)).sin()
        return gather(switch(tokens, mesh, (T, S), "tokens", "frames").sin(), mesh, (T, S))

    x = part_of(torch.randn(2, T, S, 3), mesh, 1).requires_grad_()
    torch.compile(function, backend=backend, fullgraph=True)(x)


def blocks(mesh, backend, attention, plan=None):
    mask = FrameMask(past=1, future=0, chunk=2)
    given = config(attention=attention, mask=mask, text_width=None, classes=None, checkpoint=False)
    model = VDiT(given, mesh=mesh, plan=plan)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    model(part_of(torch.randn(1, 3, 7, 6, 8), mesh, 2), torch.rand(1), frames=7)


MASKS = {
    "window": FrameMask.window(1),
    "future": FrameMask(past=0, future=1),
    "far sink": FrameMask(past=0, future=0, chunk=3, sink=2),
    "all": ALL,
}


def test_a_window():
    """Rank 0 gets nothing forward, and sends nothing backward."""
    found = graphs_of(partial(attend, mask=FrameMask.window(1)), 2)
    assert_they_meet(found)
    ((forward, backward),) = found[0]
    assert forward == [("all_to_all_single", (0, 288), (0, 0))]
    assert backward == [("all_to_all_single", (0, 0), (0, 288))]


@pytest.mark.slow
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_halo(mask, partition):
    for T, wanted in ((7, "qkv"), (7, "q"), (7, "v"), (2, "qkv")):  # of two frames a rank has none
        found = graphs_of(partial(attend, mask=MASKS[mask], T=T, wanted=wanted), 3, PARTITIONS[partition])
        assert_they_meet(found)
        assert [len(graph) for graph in found[0][0]] == [1, wanted != "q"]


@pytest.mark.slow
@pytest.mark.parametrize("partition", PARTITIONS)
def test_other_exchanges(partition):
    for function, most in (
        (partial(attend, plan="heads"), 4),
        (partial(attend, plan="heads", T=2, S=1), 4),
        (partial(attend, plan="heads", text=3), 5),
        (partial(attend, plan="halo", mask=MASKS["window"], text=3), 3),
        (partial(attend, plan="halo", mask=FrameMask.same_frame()), 0),
        (there_and_back, 3),
        (partial(there_and_back, T=2, S=1), 3),
    ):
        found = graphs_of(function, 3, PARTITIONS[partition])
        assert_they_meet(found)
        assert [len(graph) for graph in found[0][0]] == [most, most]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "plan"),
    [("factorized", "switch"), ("factorized", "halo"), ("gated", None), ("full", "halo"), ("full", "heads")],
)
def test_blocks_of_a_model(attention, plan):
    for partition in PARTITIONS.values():
        found = graphs_of(partial(blocks, attention=attention, plan=plan), 3, partition)
        assert_they_meet(found)
        assert sum(len(graph) for pair in found[0] for graph in pair)
