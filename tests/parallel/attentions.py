"""Cases of video attention over split frames, run by every rank of a world: outputs, gradients, bytes, bits."""

import itertools
from unittest import mock

import pytest
import torch
from judging import check_all, gradients_of, part_of, some

import vdcore
from vdcore import FrameMask, QKNorm, Rope, axial_rope
from vdcore.parallel import Traffic, explain, halo, ring, video_attention
from vdcore.testing import TORCH_FORMS

MASKS = {
    "full": FrameMask(),
    "causal": FrameMask.causal(),
    "window": FrameMask.window(1),
    "both sides": FrameMask.symmetric(1),
    "chunks": FrameMask(past=1, future=0, chunk=2),
    "sink": FrameMask(past=1, future=0, chunk=2, sink=1),
    "far sink": FrameMask(past=0, future=0, chunk=3, sink=2),
    "future": FrameMask(past=0, future=2),
    "same frame": FrameMask.same_frame(),
}
PLANS = ("heads", "ring", "halo")


def draw(T, S=3, H=4, G=None, D=8, *, B=2, L=0, dtype=torch.float32, seed=0):
    """q, k, v of the whole, text triple or None."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    qkv = [normal(B, T, S, n, D) for n in (H, G or H, G or H)]
    return qkv, [normal(B, L, n, D) for n in (H, G or H, G or H)] if L else None


def results(function, qkv, text, incoming, **given):
    """Outputs and gradients of one process, by name."""
    leaves = {name: x.clone().requires_grad_() for name, x in zip("qkv", qkv)}
    words = {f"text {name}": x.clone().requires_grad_() for name, x in zip("qkv", text or ())}
    extra = {"text": tuple(words.values())} if text else {}
    out = function(*leaves.values(), **extra, **given)
    outs = list(out) if isinstance(out, tuple) else [out]
    grads = gradients_of({**leaves, **words}, outs, [d.to(o.dtype) for d, o in zip(incoming, outs)])
    return {f"out {i}": o.detach() for i, o in enumerate(outs)}, grads


def compare(mesh, qkv, text, plan, **given):
    """A plan beside the operator on the whole, by the tolerance rule; returns this rank's results."""
    T, dtype = qkv[0].shape[1], qkv[0].dtype
    generator = torch.Generator().manual_seed(7)
    shapes = [qkv[0].shape, *([text[0].shape] if text else [])]
    incoming = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    if len(incoming) == 2:  # every rank has the text's result: its gradient comes in parts
        incoming[1] = incoming[1] * mesh.size()
    exact = results(
        vdcore.video_attention, [x.double() for x in qkv], text and [x.double() for x in text], incoming, **given
    )
    forms = [results(TORCH_FORMS["video_attention"][n], qkv, text, incoming, **given) for n in ("naive", "sdpa")]
    mine = [part_of(x, mesh, 1) for x in qkv]
    parts = [part_of(incoming[0], mesh, 1), *(x / mesh.size() for x in incoming[1:])]
    ours = results(video_attention, mine, text, parts, mesh=mesh, frames=T, plan=plan, **given)
    split = {"out 0", "q", "k", "v"}
    for gradient in (False, True):
        cut = [
            {n: part_of(x, mesh, 1) if n in split else x for n, x in found[gradient].items()}
            for found in (exact, *forms)
        ]
        found = ours[gradient]
        if gradient and text:
            found = {n: x if n in split else summed(x, mesh) for n, x in found.items()}
        check_all(found, cut[0], cut[1:], gradient=gradient)
    return ours


def summed(x, mesh):
    y = x.float()
    torch.distributed.all_reduce(y, group=mesh.get_group())
    return y.to(x.dtype)


def every_mask_by_every_plan(mesh):
    for T, mask, plan in some(itertools.product((7, 2), MASKS.values(), PLANS), 5):
        compare(mesh, *draw(T), plan, mask=mask)


def half_precision(mesh):
    for mask, plan in some(itertools.product(("sink", "full"), PLANS), 4):
        compare(mesh, *draw(7, dtype=torch.bfloat16), plan, mask=MASKS[mask])


def fewer_key_heads_and_heads_that_ranks_do_not_divide(mesh):
    for plan, (H, G) in some(itertools.product(PLANS, ((4, 2), (5, 5), (1, 1), (6, 3))), 5):
        compare(mesh, *draw(5, H=H, G=G), plan, mask=MASKS["chunks"])


def text_is_counted_once(mesh):
    lengths = torch.tensor([4, 2])
    for plan, sees, mask in some(itertools.product(PLANS, ("all", "text"), ("full", "sink")), 5):
        compare(mesh, *draw(5, L=4), plan, mask=MASKS[mask], text_sees=sees, text_lengths=lengths)


def lengths_of_samples(mesh):
    for plan, mask, L in some(itertools.product(("heads", "halo"), ("full", "far sink", "sink"), (0, 3)), 5):
        for valid in ([7, 3], [1, 0]):
            compare(mesh, *draw(7, L=L), plan, mask=MASKS[mask], lengths=torch.tensor(valid))
    q, k, v = (part_of(x, mesh, 1) for x in draw(7)[0])
    with pytest.raises(ValueError, match="plan must be one of heads, halo, or None, got 'ring'"):
        video_attention(q, k, v, mesh=mesh, frames=7, lengths=torch.tensor([7, 3]), plan="ring")


def norm_and_rope_by_global_frames(mesh):
    T, S, D = 5, 6, 12
    (q, k, v), _ = draw(T, S, D=D)
    rope = axial_rope((T, 2, 3), (4, 4, 4))
    own = Rope(part_of(rope.cos, mesh, 0), part_of(rope.sin, mesh, 0))
    weights = [torch.rand(D, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(2)]
    norm = QKNorm(*weights)
    expected = part_of(vdcore.video_attention(q, k, v, norm=norm, rope=rope), mesh, 1)
    for plan in PLANS:
        parts = [part_of(x, mesh, 1) for x in (q, k, v)]
        found, lse = video_attention(*parts, mesh=mesh, frames=T, norm=norm, rope=own, plan=plan, return_lse=True)
        torch.testing.assert_close(found, expected)
        _, expected_lse = vdcore.video_attention(q, k, v, norm=norm, rope=rope, return_lse=True)
        torch.testing.assert_close(lse, part_of(expected_lse, mesh, 1))


def the_same_bits_again(mesh):
    for plan, dtype in some(itertools.product(PLANS, (torch.float32, torch.bfloat16)), 3):
        first, again = (compare(mesh, *draw(7, dtype=dtype, L=3), plan, mask=MASKS["causal"]) for _ in range(2))
        for a, b in zip(first, again):
            assert all(torch.equal(a[name], b[name]) for name in a)


def sizes_of_nothing(mesh):
    """No samples, no positions, no text: everything has its shape, forward and backward."""
    for sizes, plan in some(itertools.product(({"B": 0}, {"S": 0}, {"B": 0, "L": 2}, {"L": 0}), PLANS), 5):
        T, L = 5, sizes.get("L")
        qkv, text = draw(T, **{**sizes, "L": L or 1})
        given = {} if L is None else {"text": tuple(x[:, :L] for x in text)}
        parts = [part_of(x, mesh, 1).clone().requires_grad_() for x in qkv]
        found = video_attention(*parts, mesh=mesh, frames=T, mask=MASKS["sink"], plan=plan, **given)
        outs = found if given else (found,)
        expected = vdcore.video_attention(*qkv, mask=MASKS["sink"], **given)
        for out, one in zip(outs, expected if given else (expected,)):
            torch.testing.assert_close(out, one if out is not outs[0] else part_of(one, mesh, 1))
        sum(out.sum() for out in outs).backward()
        assert all(x.grad.shape == x.shape for x in parts)


def counted_bytes_are_the_plan_s(mesh):
    rank, N = mesh.get_local_rank(), mesh.size()
    for (H, T), mask in some(itertools.product(((6, 7), (3, 2)), MASKS.values()), 5):
        qkv, _ = draw(T, H=H)
        parts = [part_of(x, mesh, 1) for x in qkv]
        found = explain(qkv[0].shape, N, mask=mask, itemsize=4)
        assert found[0].most == min(p.most for p in found if p.reason is None)
        for plan in found:
            with Traffic(rank) as traffic:
                video_attention(*parts, mesh=mesh, frames=T, mask=mask, plan=plan.name)
            assert traffic.bytes == plan.sent[rank], (mask, plan)
        with Traffic(rank) as traffic:
            video_attention(*parts, mesh=mesh, frames=T, mask=mask)
        assert traffic.bytes == found[0].sent[rank]


def nan_in_frames_that_nobody_sees_stays_there(mesh):
    (q, k, v), _ = draw(7)
    mask = FrameMask(past=0, future=0, chunk=3, sink=1)
    expected = part_of(vdcore.video_attention(q, k, v, mask=mask), mesh, 1)
    k, v = k.clone(), v.clone()
    k[:, 4], v[:, 4] = torch.nan, torch.nan  # seen by the chunk of frames 3 to 5 alone
    for plan in PLANS:
        parts = [part_of(x, mesh, 1) for x in (q, k, v)]
        out = video_attention(*parts, mesh=mesh, frames=7, mask=mask, plan=plan)
        clean = [t for t in range(out.shape[1]) if part_of(torch.arange(7), mesh, 0)[t] not in (3, 4, 5)]
        torch.testing.assert_close(out[:, clean], expected[:, clean])
        assert out[:, [t for t in range(out.shape[1]) if t not in clean]].isnan().all()


def masks_whose_frames_cannot_be_counted_from_another(mesh):
    """Masks that a later frame's index means more to than chunks and a sink: all frames stay at their own index."""
    cached = (halo.halo_of, ring.pieces_of)
    with mock.patch.object(halo, "shifts", lambda mask: False), mock.patch.object(ring, "shifts", lambda mask: False):
        for function in cached:
            function.cache_clear()
        for mask, plan in some(itertools.product(MASKS.values(), ("ring", "halo")), 5):
            compare(mesh, *draw(7), plan, mask=mask)
    for function in cached:
        function.cache_clear()


def wrong_calls_say_what_is_wrong(mesh):
    q, k, v = (part_of(x, mesh, 1) for x in draw(7)[0])
    text, whole = torch.zeros(len(q), 3, *q.shape[3:]), axial_rope((7, q.shape[2], 1), (q.shape[-1], 0, 0))
    for given, words in (
        ({"frames": 70}, r"parallel.video_attention: q and k must be the \d+ frames of rank \d of \d, of 70 in all"),
        ({"frames": 7, "plan": "star"}, "plan must be one of heads, halo, ring, or None, got 'star'"),
        ({"frames": 7, "text_lengths": torch.tensor([1])}, "text_lengths must be None without text"),
        ({"frames": 7, "text": (text, text[..., :1, :], text)}, r"text\[1\] must be \(B, L, G, D\)"),
        *([({"frames": 7, "rope": whole}, "rope.cos must be of 1 or of this rank's")] if mesh.size() > 1 else []),
    ):
        with pytest.raises(ValueError, match=words):
            video_attention(q, k, v, mesh=mesh, **given)
    for given, words in (
        ({"frames": 7, "mask": "causal"}, "mask must be a FrameMask"),
        ({"frames": 7, "text": text}, r"text must be a tuple \(q, k, v\) or None, got Tensor"),
        ({"frames": 7.0}, "frames must be an int"),
    ):
        with pytest.raises(TypeError, match=words):
            video_attention(q, k, v, mesh=mesh, **given)


CASES = {
    f.__name__: f
    for f in (
        every_mask_by_every_plan,
        half_precision,
        fewer_key_heads_and_heads_that_ranks_do_not_divide,
        text_is_counted_once,
        lengths_of_samples,
        norm_and_rope_by_global_frames,
        the_same_bits_again,
        sizes_of_nothing,
        counted_bytes_are_the_plan_s,
        nan_in_frames_that_nobody_sees_stays_there,
        masks_whose_frames_cannot_be_counted_from_another,
        wrong_calls_say_what_is_wrong,
    )
}
SLOW: dict = {}
