"""Hazard 34: forward-mode derivatives missing or zero. Transforms of torch.func, derivatives of derivatives."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support import backends_of, dtype_of
from torch.utils._python_dispatch import TorchDispatchMode

import vdcore
from vdcore.models import VDiT, VDiTConfig
from vdcore.ops.choose import ORDER, has_tangent, implementation
from vdcore.ops.derivatives import TANGENTS
from vdcore.ops.operator import capture
from vdcore.testing import CASES, directions, judge_tangents, of_leaves, pushed, quotients

FIRST = {case.op: case for case in reversed(CASES)}
each_operator = pytest.mark.parametrize("case", FIRST.values(), ids=FIRST)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def close(found, expected, **tolerance):
    """Infinities have no derivative: the log-sum-exp of rows that see nothing."""
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.nan_to_num(), y.nan_to_num(), **tolerance)


def prepared(case, dtype=torch.float32, **kwargs):
    inputs = case.inputs(dtype, **kwargs)
    return inputs, of_leaves(inputs, getattr(vdcore, case.op)), list(inputs.leaves.values()), directions(inputs)


def loss_of(function):
    return lambda *leaves: sum(y.nan_to_num(neginf=0).square().sum() for y in function(*leaves))


def all_of(leaves):
    return tuple(range(len(leaves)))


# ---- Tangents ----


def check_tangents(case):
    """In float64 against quotients, all together, and each leaf's own: they add up."""
    inputs = case.inputs(torch.float64)
    dx = directions(inputs)
    found = pushed(inputs, getattr(vdcore, case.op), dx)
    exact = quotients(case, torch.float64)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6 * (1 + float(y.abs().max()) if y.numel() else 1))
    total = [torch.zeros_like(x) for x in found]
    for i in range(len(dx)):
        f, leaves = of_leaves(inputs, getattr(vdcore, case.op)), list(inputs.leaves.values())

        def of_one(x, i=i, f=f, leaves=leaves):
            return f(*leaves[:i], x, *leaves[i + 1 :])

        one = torch.func.jvp(of_one, (leaves[i],), (dx[i],))[1]
        total = [a + b for a, b in zip(total, one)]
    close(total, found)


@each_operator
def test_tangents(case):
    check_tangents(case)


@pytest.mark.slow
@each_case
def test_tangents_of_every_case(case):
    check_tangents(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@each_case
def test_tangents_obey_the_tolerance_rule(case, dtype):
    broken = {name: r for name, r in judge_tangents(case, None, dtype).items() if not r.worst <= 1}
    assert not broken


@pytest.mark.slow
@pytest.mark.parametrize("layout", ("reversed_axes", "packed", "heads_first"))
@each_operator
def test_tangents_on_other_layouts_and_backends(case, layout):
    for backend in backends_of(case.op):
        ratios = judge_tangents(case, backend, dtype_of(backend), layout=layout, seeds=1)
        assert all(r.worst <= 1 for r in ratios.values()), backend


@pytest.mark.parametrize("case", [c for c in CASES if "attention" in c.op], ids=str)
def test_tangents_of_the_engine(case):
    """Each leaf's own, on the CPU engine, against the formula in float64."""
    inputs, exact = case.inputs(torch.float32), case.inputs(torch.float32, stored=torch.float64)
    dx, function = directions(inputs), getattr(vdcore, case.op)
    before = vdcore.calls()[case.op, "cpu", "jvp"]
    for i in range(len(dx)):

        def of_one(inputs, x, i=i):
            leaves = list(inputs.leaves.values())
            f = of_leaves(inputs, function)
            return torch.func.jvp(lambda y: f(*leaves[:i], y, *leaves[i + 1 :]), (leaves[i],), (x,))[1]

        for found, expected in zip(of_one(inputs, dx[i]), of_one(exact, dx[i].double()), strict=True):
            most = float(expected.abs().max()) if expected.numel() else 0
            torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=2e-5 * most + 1e-6)
    assert vdcore.calls()[case.op, "cpu", "jvp"] == before + len(dx)


@each_operator
def test_dual_levels(case):
    """With and without autograd beside it; what is not dual has no tangent."""
    inputs, f, leaves, dx = prepared(case)
    expected = pushed(inputs, getattr(vdcore, case.op), dx)
    for grad, needs in ((True, False), (True, True), (False, False)):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            leaves = [x.detach().requires_grad_(needs) for x in leaves]
            results = f(*(forward_ad.make_dual(x, d) for x, d in zip(leaves, dx)))
            close([forward_ad.unpack_dual(y).tangent for y in results], expected)
            assert all(forward_ad.unpack_dual(y).tangent is None for y in f(*leaves))
            if needs:
                found = torch.autograd.grad(sum(y.nan_to_num(neginf=0).sum() for y in results), leaves)
                close(
                    found,
                    torch.func.grad(lambda *x: sum(y.nan_to_num(neginf=0).sum() for y in f(*x)), all_of(leaves))(
                        *leaves
                    ),
                )


def test_a_tangent_that_comes_with_backward():
    """A graph recorded before the level, and a gradient that has a tangent: backward is linear in it."""
    q = torch.randn(1, 3, 2, 2, 8, requires_grad=True)
    out = vdcore.temporal_attention(q, q, q)
    dy, ddy = torch.randn_like(out), torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, q, ddy, retain_graph=True)
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(out, q, forward_ad.make_dual(dy, ddy))
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, expected)


def test_tangents_do_not_read_what_is_invisible():
    """NaN in keys that no frame sees, and in tangents of them, stays there."""
    q, k, v, dq, dk, dv = (torch.randn(1, 4, 3, 2, 8) for _ in range(6))
    lengths = torch.tensor([2])

    def both(q, k, v):
        mask = vdcore.FrameMask.causal()
        return tuple(
            x[:, :2]
            for f in (vdcore.temporal_attention, vdcore.video_attention)
            for x in f(q, k, v, mask=mask, lengths=lengths, return_lse=True)
        )

    expected = torch.func.jvp(both, (q, k, v), (dq, dk, dv))[1]
    for x in (k, v, dk, dv):
        x[:, 2:] = float("nan")
    close(torch.func.jvp(both, (q, k, v), (dq, dk, dv))[1], expected, equal_nan=False)


def test_tangents_have_the_same_bits_on_any_number_of_threads():
    q, k, v, dq, dk, dv = torch.randn(6, 2, 9, 80, 2, 40)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for f in (vdcore.temporal_attention, vdcore.video_attention):

                def both(*qkv, f=f):
                    return f(*qkv, mask=vdcore.FrameMask.window(3), return_lse=True)

                found.append(torch.func.jvp(both, (q, k, v), (dq, dk, dv))[1])
    finally:
        torch.set_num_threads(before)
    for i, (out, lse) in enumerate(found):
        assert torch.equal(out, found[i % 2][0]) and torch.equal(lse, found[i % 2][1])


def test_explain_says_who_computes_tangents():
    q, dq = torch.randn(1, 3, 2, 2, 8), torch.randn(1, 3, 2, 2, 8)
    plain = vdcore.explain("temporal_attention", q, q, q)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, dq)
        assert has_tangent(dual) and not has_tangent(q, None)
        rows = vdcore.explain("temporal_attention", dual, q, q)
        assert rows == [*plain, ("tangents", "by cpu")]
        with vdcore.use_backend("sdpa"):
            rows = vdcore.explain("temporal_attention", dual, q, q)
            reason = "the sdpa backend has no tangents of temporal_attention"
            assert rows == [*plain, ("tangents", f"by the formula in torch's operators: {reason}")]
        for backend, by in (("cpu", "cpu"), ("sdpa", "reference")):
            before = vdcore.calls()["temporal_attention", by, "jvp"]
            vdcore.temporal_attention(dual, q, q, backend=backend)
            assert vdcore.calls()["temporal_attention", by, "jvp"] == before + 1
    assert vdcore.explain("temporal_attention", q, q, q) == plain


def test_explain_says_who_computes_tangents_under_masks_of_a_grid():
    q, dq = torch.randn(1, 2, 6, 2, 8), torch.randn(1, 2, 6, 2, 8)
    lists = vdcore.select_tiles(q, q, tile=(1, 2, 3), grid=(2, 3), keep=1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, dq)
        windows = vdcore.explain("video_attention", dual, q, q, mask=vdcore.GridMask(rows=0), grid=(2, 3))
        tiles = vdcore.explain("tile_attention", dual, q, q, lists, tile=(1, 2, 3), grid=(2, 3))
    assert windows[-1] == tiles[-1] == ("tangents", "by cpu")


@pytest.mark.parametrize("level", ("jvp", "dual"))
@pytest.mark.parametrize("needs", ((True, False), (False, True), (True, True)), ids=("q", "dq", "both"))
def test_gradients_of_results_and_of_their_tangents(needs, level):
    """Of a loss of both, as autograd records them below the transform: by the inputs and by their tangents."""
    q, k, dq = (torch.randn(1, 3, 2, 2, 8, dtype=torch.float64) for _ in range(3))

    def both(q, dq, backend):
        def f(q):
            return vdcore.video_attention(q, k, k, backend=backend)

        if level == "jvp":
            return torch.func.jvp(f, (q,), (dq,))
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(q, dq))))

    def gradients(backend, dtype):
        x = [y.to(dtype).requires_grad_(yes) for y, yes in zip((q, dq), needs)]
        nonlocal k
        k = k.to(dtype)
        out, dout = both(*x, backend)
        return torch.autograd.grad(out.square().sum() + (dout * dout.cos()).sum(), [y for y in x if y.requires_grad])

    exact, before = gradients("reference", torch.float64), vdcore.calls()
    close([x.double() for x in gradients("cpu", torch.float32)], exact, rtol=1e-4, atol=1e-4)
    assert (vdcore.calls() - before)["video_attention", "cpu", "jvp"] == 1


def test_tangents_by_another_than_forward(monkeypatch):
    """Where forward is run by one that has none: of what it left."""
    monkeypatch.setitem(ORDER, "cpu", ("sdpa", "cpu", "reference"))
    q, dq = torch.randn(1, 3, 2, 2, 8), torch.randn(1, 3, 2, 2, 8)
    before = vdcore.calls()
    found = torch.func.jvp(lambda q: vdcore.video_attention(q, q, q), (q,), (dq,))
    assert vdcore.calls() - before == {("video_attention", "sdpa", "fwd"): 1, ("video_attention", "cpu", "jvp"): 1}
    expected = torch.func.jvp(lambda q: vdcore.video_attention(q, q, q, backend="reference"), (q,), (dq,))
    close(found, expected, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        rows = vdcore.explain("video_attention", forward_ad.make_dual(q, dq), q, q)
    assert rows[0][0] == "sdpa" and rows[-1] == ("tangents", "by cpu")


@each_operator
def test_tangents_of_what_is_watched(case):
    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs, _, _, dx = prepared(case)
    expected = pushed(inputs, getattr(vdcore, case.op), dx)
    with Watch() as watch:
        found = pushed(inputs, getattr(vdcore, case.op), dx)
    close(found, expected)
    assert any(f"vdcore.{case.op}" in name for name in watch.seen)
    f, leaves = of_leaves(inputs, getattr(vdcore, case.op)), inputs.leaves.values()
    with Watch() as watch, forward_ad.dual_level():
        results = f(*(forward_ad.make_dual(x, d) for x, d in zip(leaves, dx)))
        close([forward_ad.unpack_dual(y).tangent for y in results], expected)
    assert any(f"vdcore.{case.op}" in name for name in watch.seen)


# ---- Transforms of torch.func ----


@each_operator
def test_grad_and_vjp(case):
    _, f, leaves, _ = prepared(case)
    loss, wanted = loss_of(f), [x.clone().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(loss(*wanted), wanted)
    close(torch.func.grad(loss, all_of(leaves))(*leaves), expected)
    close(torch.func.vjp(loss, *leaves)[1](torch.ones(())), expected)
    (first,) = torch.func.vjp(lambda x: loss(x, *leaves[1:]), leaves[0])[1](torch.ones(()))
    close([first], expected[:1])


@each_operator
def test_vmap_over_any_argument(case):
    _, f, leaves, _ = prepared(case)
    for i, x in enumerate(leaves):

        def of_one(x, i=i):
            return f(*leaves[:i], x, *leaves[i + 1 :])

        many = torch.stack((x, 1.5 * x), 1)
        close(torch.func.vmap(of_one, in_dims=1)(many), [torch.stack(y) for y in zip(*map(of_one, many.unbind(1)))])


@each_operator
def test_vmap_with_grad_and_jvp(case):
    """In either order."""
    _, f, leaves, dx = prepared(case)

    def loss(x):
        return loss_of(f)(x, *leaves[1:])

    many, directions = torch.stack((leaves[0], 1.5 * leaves[0])), torch.stack((dx[0], -2 * dx[0]))
    expected = torch.stack([torch.func.grad(loss)(x) for x in many])
    close([torch.func.vmap(torch.func.grad(loss))(many)], [expected])
    close([torch.func.grad(lambda m: torch.func.vmap(loss)(m).sum())(many)], [expected])

    def push(x, dx):
        return torch.func.jvp(loss, (x,), (dx,))[1]

    expected = torch.stack([push(x, d) for x, d in zip(many, directions)])
    close([torch.func.vmap(push)(many, directions)], [expected])
    close([torch.func.jvp(torch.func.vmap(loss), (many,), (directions,))[1]], [expected])


def test_vmap_over_lengths():
    q = torch.randn(2, 4, 3, 2, 8)
    lengths = torch.tensor([[4, 1], [2, 3]])

    def of_lengths(n):
        return torch.func.jvp(lambda q: vdcore.temporal_attention(q, q, q, lengths=n), (q,), (q,))[1]

    close(torch.func.vmap(of_lengths)(lengths), torch.stack([of_lengths(n) for n in lengths]))


def test_jacobians():
    q, k, v = (torch.randn(1, 2, 2, 1, 4, dtype=torch.float64) for _ in "qkv")
    for f in (vdcore.temporal_attention, vdcore.spatial_attention, vdcore.video_attention):
        forward, backward = torch.func.jacfwd(f, (0, 1, 2))(q, k, v), torch.func.jacrev(f, (0, 1, 2))(q, k, v)
        close(forward, backward)
        assert all(x.abs().max() > 0.01 for x in forward)
    x, shift = torch.randn(1, 1, 2, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    close(
        torch.func.jacfwd(vdcore.modulate, (0, 1, 2))(x, shift, shift),
        torch.func.jacrev(vdcore.modulate, (0, 1, 2))(x, shift, shift),
    )


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, backend="aot_eager", fullgraph=True)


def test_compiled_tangents_are_right_or_an_error():
    q, dq = torch.randn(1, 3, 2, 2, 8), torch.randn(1, 3, 2, 2, 8)

    def f(q):
        return vdcore.temporal_attention(q * 1, q, q)

    def push(q, dq):
        return torch.func.jvp(f, (q,), (dq,))[1]

    def dual(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(q, dq))).tangent

    expected, message = push(q, dq), "temporal_attention: as torch's operator"
    torch._dynamo.reset()
    torch.testing.assert_close(torch.func.jvp(torch.compile(f, backend="aot_eager"), (q,), (dq,))[1], expected)
    with pytest.raises(RuntimeError, match=message):
        compiled(torch.func.grad(lambda q: f(q).sum()))(q)
    with pytest.raises(RuntimeError, match=message):
        compiled(lambda q: torch.func.jvp(lambda q: push(q, dq), (q,), (dq,))[1])(q)
    with pytest.raises(RuntimeError, match=message):
        dual(torch.compile(f, backend="aot_eager"))


@each_operator
def test_tangents_inside_a_compiled_function(case):
    inputs, f, leaves, dx = prepared(case)

    def push(leaves, dx):
        return torch.func.jvp(f, tuple(leaves), tuple(dx))[1]

    if case.op == "tile_attention":
        with pytest.raises(RuntimeError, match=r"tile_attention: as torch's operator, .* has no tangents"):
            compiled(push)(leaves, dx)
        return
    before = vdcore.calls()
    expected = push(leaves, dx)
    eager, before = vdcore.calls() - before, vdcore.calls()
    close(compiled(push)(leaves, dx), expected)
    by = {which: n for which, n in (vdcore.calls() - before).items() if which[2] == "jvp"}
    assert by == {which: n for which, n in eager.items() if which[2] == "jvp"}


@pytest.mark.parametrize("op", TANGENTS)
def test_opcheck_of_the_operator_of_tangents(op):
    case = FIRST[op]
    inputs, _, leaves, dx = prepared(case)
    call = capture(getattr(vdcore, case.op), **inputs.args)
    call.grad = True
    tensors = call.tensors()
    kept = implementation(call, "reference").forward(call) if call.SAVES_OUTPUTS else ()
    at = {x.data_ptr(): d for x, d in zip(leaves, dx)}
    tangents = [None if x is None else at.get(x.data_ptr()) for x in tensors]
    tangents = [dx if dx is None or dx.shape == x.shape else None for x, dx in zip(tensors, tangents)]
    assert any(dx is not None for dx in tangents)
    operator = getattr(torch.ops.vdcore, f"{case.op}_jvp").default
    torch.library.opcheck(operator, (*kept, *tangents, *tensors, *call.numbers(), "auto"))


def test_a_compiled_loss_with_a_tangent_in_it():
    """As MeanFlow's: gradients beside a tangent that is detached; through one, an error by name."""
    q, k, v, dq = (torch.randn(1, 3, 4, 2, 8) for _ in range(4))

    def loss(q, k, v, dq, through=False):
        out, dout = torch.func.jvp(lambda q: vdcore.video_attention(q, k, v), (q,), (dq,))
        return (out - (dout if through else dout.detach())).square().sum()

    leaves = [x.requires_grad_() for x in (q, k, v)]
    close(torch.autograd.grad(compiled(loss)(*leaves, dq), leaves), torch.autograd.grad(loss(*leaves, dq), leaves))
    with pytest.raises(RuntimeError, match="video_attention: derivatives of tangents are not supported"):
        torch.autograd.grad(compiled(loss)(*leaves, dq, True), leaves)


def test_compiled_tangents_and_vmap():
    q, k, v, dq = (torch.randn(1, 3, 2, 2, 8) for _ in range(4))
    many = torch.stack((q, 2 * q))

    def attend(q):
        return vdcore.video_attention(q, k, v)

    def of_each(many):
        return torch.func.vmap(lambda q: torch.func.jvp(attend, (q,), (dq,))[1])(many)

    def of_all(many):
        return torch.func.jvp(torch.func.vmap(attend), (many,), (many,))[1]

    def jacobian(many):
        return torch.func.jacfwd(lambda q: attend(q).sum(-1))(many[0])

    for f in (of_each, of_all, jacobian):
        close([compiled(f)(many)], [f(many)])


# ---- Derivatives of derivatives ----


@each_operator
def test_hessian_vector_products(case):
    """jvp of grad, and the gradient of a gradient, in float64 against quotients of gradients."""
    _, f, leaves, dx = prepared(case, torch.float64)
    gradient = torch.func.grad(loss_of(f), all_of(leaves))
    h = 1e-5
    above, below = (gradient(*(x + s * d for x, d in zip(leaves, dx))) for s in (h, -h))
    expected = [(a - b) / (2 * h) for a, b in zip(above, below)]
    most = max(float(x.abs().max()) for x in expected)
    close(torch.func.jvp(gradient, tuple(leaves), tuple(dx))[1], expected, rtol=1e-5, atol=1e-6 * most)
    with vdcore.double_backward("reference"):
        wanted = [x.clone().requires_grad_() for x in leaves]
        first = torch.autograd.grad(loss_of(f)(*wanted), wanted, create_graph=True)
        found = torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, dx)), wanted)
    close(found, expected, rtol=1e-5, atol=1e-6 * most)


@each_operator
def test_derivatives_of_tangents(case):
    _, f, leaves, dx = prepared(case, torch.float64)

    def push(*leaves):
        return torch.func.jvp(f, leaves, tuple(dx))[1]

    h = 1e-5
    above, below = (push(*(x + s * d for x, d in zip(leaves, dx))) for s in (h, -h))
    expected = [(a - b) / (2 * h) for a, b in zip(above, below)]
    most = max(float(x.abs().max()) for x in expected)
    close(torch.func.jvp(push, tuple(leaves), tuple(dx))[1], expected, rtol=1e-5, atol=1e-6 * most)
    pulled = torch.func.grad(lambda *x: sum(y.sum() for y in push(*x)), all_of(leaves))(*leaves)
    along = sum(float((g * d).sum()) for g, d in zip(pulled, dx))
    assert along == pytest.approx(sum(float(x.sum()) for x in expected), rel=1e-4, abs=1e-6 * most)


@each_operator
def test_double_backward_is_an_error_that_names_the_switch(case):
    _, f, leaves, _ = prepared(case)
    wanted = [x.clone().requires_grad_() for x in leaves]
    first = torch.autograd.grad(loss_of(f)(*wanted), wanted, create_graph=True)
    message = rf"{case.op}: double backward is not supported; with vdcore\.double_backward\('reference'\)"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(sum(x.sum() for x in first), wanted)
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda *x: sum(y.sum() for y in torch.func.grad(loss_of(f), all_of(x))(*x)))(*leaves)


def test_double_backward_takes_the_reference_alone():
    with (
        pytest.raises(ValueError, match="double_backward: by must be 'reference', got 'cpu'"),
        vdcore.double_backward("cpu"),
    ):
        pass


@pytest.mark.slow
@each_operator
def test_gradcheck(case):
    inputs = case.inputs(torch.float64, requires_grad=True)
    f = of_leaves(inputs, getattr(vdcore, case.op), backend="reference")
    leaves = tuple(inputs.leaves.values())
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, fast_mode=True)
    with vdcore.double_backward("reference"):
        assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


# ---- Models ----


@pytest.mark.parametrize("attention", ("factorized", "gated", "full"))
def test_a_model_by_its_timestep(attention):
    """Per sample and per frame; what a cache would forget is refused."""
    torch.manual_seed(0)
    config = VDiTConfig(
        in_channels=2, width=32, heads=2, depth=2, attention=attention, text_width=8, mask=vdcore.FrameMask.causal()
    )
    model = VDiT(config).double().eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.2)
    video, t = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    text = torch.randn(2, 5, 8, dtype=torch.float64)

    def f(t):
        return model(video, t, text=text)

    for time in (t, t[:, None] + torch.rand(2, 3, dtype=torch.float64)):
        dt = torch.ones_like(time)
        found = torch.func.jvp(f, (time,), (dt,))[1]
        expected = (f(time + 3e-3) - f(time - 3e-3)) / 6e-3  # timesteps are embedded in float32
        most = expected.abs().max()
        assert most > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(most))
        with torch.no_grad(), forward_ad.dual_level():  # writes in place where nothing is recorded
            torch.testing.assert_close(forward_ad.unpack_dual(f(forward_ad.make_dual(time, dt))).tangent, found)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(t, torch.ones_like(t))
        with pytest.raises(RuntimeError, match="VDiT: a cache holds no tangents"):
            model(video[:, :, :1], dual, text=text, cache=model.new_cache(2, 4, 4, frames=3))
