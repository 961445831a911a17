"""Cases of diffusers' models on a mesh, run by every rank of a world: outputs and gradients beside the host's own.

Clips have seven frames, which none of two, three and four ranks divide; heads are two.
"""

import hashlib
import os
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache

import torch
from judging import part_of

from vdcore import FrameMask
from vdcore.parallel import average_gradients

MASKS = {"window": FrameMask.window(1), "symmetric": FrameMask.symmetric(1), "chunks": FrameMask(future=0, chunk=2)}
FAMILIES = ("Latte", "SVD", "AnimateDiff", "Wan", "CogVideoX")


@dataclass(frozen=True)
class Case:
    """
    Args:
        parts: each rank passes and gets its frames.
        checkpoint: the host's gradient checkpointing is on.
    """

    name: str
    dtype: torch.dtype = torch.float32
    mask: str | None = None
    plan: str | None = None
    parts: bool = False
    checkpoint: bool = False


def cases(thorough):
    quick = [Case(name) for name in FAMILIES]
    if not thorough:
        return quick
    found = [replace(case, dtype=dtype) for case in quick for dtype in (torch.float32, torch.bfloat16)]
    found += [replace(case, parts=True) for case in quick] + [replace(case, checkpoint=True) for case in quick]
    found += [Case(name, plan=plan) for name in ("Wan", "CogVideoX") for plan in ("heads", "ring", "halo")]
    found += [Case(name, mask=mask) for name in FAMILIES for mask in MASKS]
    found += [Case("Wan", mask="chunks", plan=plan) for plan in ("heads", "ring")]
    found += [Case(name) for name in ("Wan I2V", "Wan by token", "CogVideoX added positions", "CogVideoX resized")]
    return found


def models():
    """The tiny models, and some more whose arguments have frames."""
    import diffusers
    import zoo
    from zoo import joint

    found = dict(zoo.MODELS)

    def by_token():
        given = found["Wan"].inputs()
        return {**given, "timestep": torch.arange(2 * zoo.T * 6).view(2, -1) * 5}

    found["Wan by token"] = replace(found["Wan"], inputs=by_token)

    def added(columns=6, frames=25):
        return diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=1,
            sample_width=columns,
            sample_height=4,
            sample_frames=frames,
            max_text_seq_length=5,
        )

    def inputs():
        return {name: x for name, x in joint._cogvideox_inputs().items() if name != "image_rotary_emb"}

    found["CogVideoX added positions"] = zoo.Tiny(added, inputs)
    found["CogVideoX resized"] = zoo.Tiny(lambda: added(12, 9), inputs)
    return found


@cache
def runs():
    import host_runs

    host_runs.MODELS.update(models())
    return host_runs


# ---- What is expected ----


def dense(case):
    """The mode that puts the case's mask on a host."""
    if case.mask is None:
        return nullcontext()
    mask, factorized = MASKS[case.mask], runs().MODELS[case.name].factorized
    sees = "text" if mask.future == 0 else "all"
    return runs().DenseMask(mask, None if factorized else 7 * 6, 5, "CogVideoX" in case.name, sees)


@cache
def expected(name, dtype, mask):
    """The host's output and gradients, from end to end in float64 or in a dtype."""
    case, host = Case(name, mask=mask), runs()
    with dense(case), host.Float64() if dtype == torch.float64 else nullcontext():
        return everything(host.MODELS[name].model(dtype), name, dtype)


def everything(model, name, dtype):
    """The output, and gradients of a fixed combination of it, by parameter and floating input."""
    with torch.no_grad():
        out = runs().run(model, name, dtype)
    return out, runs().gradients(model, name, dtype)


# ---- What ranks find ----


def shared(mesh, case):
    """The same on a mesh; every rank has all of it."""
    from vdcore.integrations.diffusers import swap_in

    model = runs().MODELS[case.name].model(case.dtype)
    mask = None if case.mask is None else MASKS[case.mask]
    report = swap_in(model, mask=mask, mesh=mesh, plan=case.plan, parts=case.parts)
    assert not report.left, report
    if case.checkpoint:
        model.enable_gradient_checkpointing()
        model.train()
    out, found = by_parts(mesh, model, case) if case.parts else everything(model, case.name, case.dtype)
    assert not report.left, report
    for name, p in model.named_parameters():
        p.grad = found[name]
    average_gradients(model, mesh)
    return out, {**found, **{name: p.grad for name, p in model.named_parameters()}}


def with_frames(name, given):
    """By argument, where its frames are: a dimension, and how many frames it counts of each sample there."""
    found = {"sample": 1 if name == "SVD" else 2, "hidden_states": 1 if name == "CogVideoX" else 2}
    return {key: dim for key, dim in found.items() if key in given}


def by_parts(mesh, model, case):
    """As :func:`everything`, each rank with its frames; parts are put together again."""
    name, host = case.name, runs()
    given = host.MODELS[name].arguments(case.dtype)
    ((clip, axis),) = with_frames(name, given).items()
    mine = {**given, clip: part_of(given[clip], mesh, axis)}
    if name == "AnimateDiff":
        text = given["encoder_hidden_states"].unflatten(0, (2, 7))
        mine["encoder_hidden_states"] = part_of(text, mesh, 1).flatten(0, 1)
    if name == "CogVideoX":
        tables = (part_of(x.unflatten(0, (7, 6)), mesh, 0).flatten(0, 1) for x in given["image_rotary_emb"])
        mine["image_rotary_emb"] = tuple(tables)
    leaves = dict(model.named_parameters())
    for key, x in mine.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            mine[key] = leaves[f"input {key}"] = x.clone().requires_grad_()
    out = model(**mine, return_dict=False)[0]
    whole = gathered(out.detach(), mesh, axis)
    dy = torch.randint(-8, 9, whole.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype) / 8
    found = torch.autograd.grad(out, list(leaves.values()), part_of(dy, mesh, axis), allow_unused=True)
    found = dict(zip(leaves, found))
    for key in [key for key in found if key.startswith("input ") and found[key] is not None]:
        if key == f"input {clip}":
            found[key] = gathered(found[key], mesh, axis)
        elif name == "AnimateDiff" and key == "input encoder_hidden_states":
            frames = mine["encoder_hidden_states"].shape[0] // 2
            found[key] = gathered(found[key].unflatten(0, (2, frames)), mesh, 1).flatten(0, 1)
        else:  # the same on every rank, each with its share
            total = found[key].float()
            torch.distributed.all_reduce(total, group=mesh.get_group())
            found[key] = total.to(found[key].dtype)
    return whole, found


def gathered(x, mesh, dim):
    parts = [None] * mesh.size()
    torch.distributed.all_gather_object(parts, x, group=mesh.get_group())
    return torch.cat(parts, dim)


def judge(case, ours):
    """The tolerance rule; of gradients every tensor's over its own largest value, all of them together."""
    from vdcore.testing import error_ratio

    exact, host = (expected(case.name, dtype, case.mask) for dtype in (torch.float64, case.dtype))
    ratio = error_ratio(ours[0], exact[0], [host[0]])
    assert ratio.worst <= 1, f"output: {ratio}"
    truth = {key: dx for key, dx in exact[1].items() if dx is not None and host[1][key] is not None and dx.numel()}
    assert {key for key, dx in ours[1].items() if dx is not None} >= set(truth)
    largest = max(dx.abs().max() for dx in truth.values())
    columns = []
    for key, dx in truth.items():
        # The gradient of a bias of keys is 0 but for rounding: it is measured against the others.
        scale = max(dx.abs().max(), 1e-6 * largest)
        columns.append([(x.double() / scale).flatten() for x in (ours[1][key], dx, host[1][key])])
    mine, truth, host = (torch.cat(column) for column in zip(*columns))
    ratio = error_ratio(mine.to(case.dtype), truth, [host], gradient=True)
    assert ratio.worst <= 1, f"gradients: {ratio}"


def digest(found):
    out, gradients = found
    tensors = [out, *(dx for dx in gradients.values() if dx is not None)]
    return hashlib.sha256(b"".join(x.detach().float().numpy().tobytes() for x in tensors)).hexdigest()


def run_cases(mesh, thorough, twice=False):
    """On every rank, by case: what went wrong, and a digest of the results, the same on every rank."""
    import logging

    os.environ["ZOO_FRAMES"] = "7"  # of this process, which imports the tiny models only now
    logging.disable(logging.WARNING)
    found = {}
    for i, case in enumerate(cases(thorough)):
        try:
            ours = shared(mesh, case)
            bits = digest(ours)
            if twice:
                assert digest(shared(mesh, case)) == bits, "other bits in a second run"
            if i % mesh.size() == mesh.get_local_rank():
                judge(case, ours)
            found[case] = None, bits
        except BaseException:
            found[case] = traceback.format_exc(), None
    return found
