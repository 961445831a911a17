"""Hazard 19: fakes whose strides differ from the real ones. opcheck on transposed inputs, and fullgraph compilation."""

import pytest
import torch
from support import FAST, on_backends, skip_unless_runs

import vdcore
from vdcore.ops.operator import capture
from vdcore.testing import CASES, cases_of, run

# A contiguous tensor hides a fake that says empty_like; these layouts do not.
LAYOUTS = ["reversed_axes", "packed"]


# What a layout shows is how the operator was registered: every operator in both, every case in one of them.
OPCHECKS = [
    (case, layout)
    for number, case in enumerate(CASES)
    for layout in (LAYOUTS if "plain" in case.tags else [LAYOUTS[number % 2]])
]


@pytest.mark.parametrize("case,layout", OPCHECKS, ids=str)
def test_opcheck(case, layout):
    inputs = case.inputs(torch.float32, requires_grad=True, layout=layout)
    call = capture(getattr(vdcore, case.op), **inputs.args)
    arguments = (*call.tensors(), *call.numbers(), True, "auto")
    torch.library.opcheck(getattr(torch.ops.vdcore, case.op).default, arguments)


@on_backends(cases_of(tag="plain") + cases_of(tag="norm_rope"), FAST)
def test_fullgraph(case, backend):
    """Compiled, forward and backward, is what eager is; ``use_backend`` inside the graph counts."""
    inputs = skip_unless_runs(case, backend, torch.float32, requires_grad=True, layout="heads_first")
    function = getattr(vdcore, case.op)

    def model(**args):
        with vdcore.use_backend(backend):
            return function(**args)

    torch._dynamo.reset()
    eager = run(inputs, model)
    compiled = run(inputs, torch.compile(model, fullgraph=True, backend="aot_eager"))
    for a, b in zip(compiled.outputs, eager.outputs):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()
    for name, dx in compiled.gradients.items():
        torch.testing.assert_close(dx, eager.gradients[name])


def test_inductor_and_dynamic_shapes():
    def model(q, k, v):
        return vdcore.temporal_attention(q * 2, k, v, mask=vdcore.FrameMask.window(2)).relu()

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for T in (4, 7, 9):
        q, k, v = (torch.randn(2, T, 3, 2, 16) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v), model(q, k, v))


def test_one_graph_for_all_sizes():
    """Frames, tokens and words are free sizes: one graph for all of them."""

    def model(x, text, bias):
        x = x + vdcore.spatial_attention(x, x, x)
        x = x + vdcore.temporal_attention(x, x, x, mask=vdcore.FrameMask.window(2), bias=bias)
        x = x + vdcore.video_attention(x, x, x, mask=vdcore.FrameMask.causal())
        return vdcore.cross_attention(x, text, text)

    graphs = 0

    def counted(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    for T, S, L in ((4, 6, 5), (7, 10, 3), (9, 15, 8), (5, 21, 13)):
        x, text, bias = torch.randn(2, T, S, 2, 16), torch.randn(2, L, 2, 16), torch.randn(2, T, T)
        for tensor, dims in ((x, (1, 2)), (text, (1,)), (bias, (1, 2))):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        torch.testing.assert_close(compiled(x, text, bias), model(x, text, bias))
    assert graphs == 1


def test_use_backend_is_guarded():
    """A graph compiled under one backend is not reused under another."""
    q, k, v = (torch.randn(1, 4, 3, 2, 16) for _ in range(3))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: vdcore.temporal_attention(*a), fullgraph=True, backend="aot_eager")
    for name in ("cpu", "reference", "cpu"):
        before = vdcore.calls()["temporal_attention", name, "fwd"]
        with vdcore.use_backend(name):
            compiled(q, k, v)
        assert vdcore.calls()["temporal_attention", name, "fwd"] == before + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask", [{}, {"mask": vdcore.GridMask.window(1, 0, 1, 1), "grid": (1, 2)}], ids=["frames", "grid"]
)
def test_a_package_of_aotinductor_holds_the_operator(mask, tmp_path):
    """It hands operators what they are called with as it wrote it down: an empty list arrives as nothing at all."""

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return vdcore.video_attention(q, k, v, **mask)

    given = tuple(torch.randn(1, 2, 2, 2, 8) for _ in range(3))
    with torch.no_grad():
        exported = torch.export.export(Attention(), given)
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "attention.pt2"))
        package = torch._inductor.package.load_package(path, run_single_threaded=True)
        torch.testing.assert_close(package(*given), Attention()(*given))
