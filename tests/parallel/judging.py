"""What the ranks of a world share: how a result is held to one process's."""

import torch

from vdcore.testing.tolerance import Errors, errors, pooled, ratio

THOROUGH = [False]  # set once for a world


def some(items, every=4):
    """All, or in a world of the quick tests every so many."""
    items = list(items)
    return items if THOROUGH[0] else items[::every]


def part_of(x, mesh, dim):
    """This rank's slice by numpy.array_split, whatever the dimension."""
    return x.tensor_split(mesh.size(), dim)[mesh.get_local_rank()]


def relative(x, exact):
    """Errors over the largest value of what is exact."""
    found = errors(x, exact)
    scale = found.scale or 1.0
    return Errors(found.maximum / scale, found.rms / scale, 1.0)


def check_all(ours, exact, others, *, gradient=False):
    """The tolerance rule, pooled over tensors, each in units of its largest value.

    Args:
        ours, exact: tensors by name.
        others: what PyTorch computes in the same dtype: the same, once per form.
    """
    names = [name for name, x in exact.items() if x.numel()]
    assert set(ours) == set(exact)
    if not names:
        return
    mine = pooled([relative(ours[name], exact[name]) for name in names])
    forms = [pooled([relative(form[name], exact[name]) for name in names]) for form in others]
    found = ratio(mine, forms, ours[names[0]].dtype, gradient=gradient).worst
    assert found <= 1, f"error over what is allowed: {found}; {mine} beside {forms}"


def gradients_of(tensors, outputs, incoming):
    """By name; zeros where there is none."""
    found = torch.autograd.grad(outputs, list(tensors.values()), incoming, allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(tensors.items(), found)}
