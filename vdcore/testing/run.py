"""Running a case on a backend, and judging it by the tolerance rule."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vdcore
from vdcore.testing.cases import TORCH_FORMS, Case, Inputs
from vdcore.testing.layouts import lay_out
from vdcore.testing.tolerance import Errors, Ratio, errors, pooled, ratio

LEAST_DRAWS, MOST_DRAWS, LEAST_VALUES = 4, 16, 64
# A gradient that is 0 but for float64's rounding (of q where a row sees one key, of a bias of all keys) has no scale of
# its own: its ulp is that of the call's largest gradient.
NOTHING = 1e-12


@dataclass
class Outcome:
    """Results of one call: outputs in order, and gradients by leaf name (empty if none were asked for)."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """All tensors: ``"output 0"``, ..., then the gradients by the names of their leaves."""
        return {**{f"output {i}": x for i, x in enumerate(self.outputs)}, **self.gradients}


def flatten(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result for x in flatten(part)]


def run(
    inputs: Inputs, function: Callable[..., Any], *, gradients: bool = True, layout: str = "contiguous", **kwargs: Any
) -> Outcome:
    """Calls the function; gradients are of a fixed random combination of its outputs, -inf left out.

    Args:
        layout: of the incoming gradients.
    """
    outputs = flatten(function(**inputs.args, **kwargs))
    if not gradients:
        return Outcome([x.detach() for x in outputs], {})
    wanted = {name: x for name, x in inputs.leaves.items() if x.requires_grad}
    incoming = []
    for i, y in enumerate(outputs):
        generator = torch.Generator("cpu").manual_seed(1000 + i)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu")
        # Every precision of a case gets the same incoming gradient: one that the lowest can hold.
        dy = dy.to(torch.bfloat16).to(y.dtype).to(y.device)
        dy = torch.where(y.detach().isfinite(), dy, torch.zeros_like(dy))
        incoming.append(lay_out(dy, layout))
    found = torch.autograd.grad(outputs, list(wanted.values()), incoming, allow_unused=True)
    grads = {name: torch.zeros_like(x) if dx is None else dx for (name, x), dx in zip(wanted.items(), found)}
    return Outcome([x.detach() for x in outputs], grads)


# ---- What a case is held to: computed once per case, dtype and seed ----

Truth = tuple[dict[str, Tensor], list[dict[str, Errors]]]  # exact results; errors of PyTorch's forms, by result


def _digest(case: Case, dtype: torch.dtype, seed: int, gradients: bool) -> str:
    """Names what a case draws by its contents: cases of one name in two files are two."""
    inputs = case.inputs(dtype, seed=seed)
    digest = hashlib.sha1(repr((case.op, dtype, gradients, torch.backends.cpu.get_cpu_capability())).encode())

    def add(x: Any) -> None:
        if isinstance(x, Tensor):
            digest.update(repr((x.dtype, x.shape)).encode() + x.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(x, (list, tuple)):
            digest.update(str(len(x)).encode())
            for part in x:
                add(part)
        elif hasattr(x, "__dict__"):
            digest.update(type(x).__name__.encode())
            add([part for item in sorted(vars(x).items()) for part in item])
        else:
            digest.update(repr(x).encode())

    add([part for item in sorted(inputs.args.items()) for part in item])
    return digest.hexdigest()


def _compute(case: Case, dtype: torch.dtype, seed: int, gradients: bool) -> Truth:
    def draw(**kwargs: Any) -> Inputs:
        return case.inputs(dtype, seed=seed, requires_grad=gradients, **kwargs)

    function = getattr(vdcore, case.op)
    exact = run(draw(stored=torch.float64), function, gradients=gradients, backend="reference").named()
    forms = []
    for form in TORCH_FORMS[case.op].values():
        found = run(draw(), form, gradients=gradients).named()
        forms.append({name: errors(x, exact[name]) for name, x in found.items()})
    return exact, forms


_truths: dict[str, Truth] = {}


def truth(case: Case, dtype: torch.dtype, seed: int, *, gradients: bool = True) -> Truth:
    """The float64 results of a case, and the errors of every torch form on it, by result's name.

    Kept in this process, and where the environment variable ``VDCORE_TESTING_CACHE`` names a folder, in files there for
    other processes: the reference takes a hundred times as long as the engine. Such a folder is for one version of the
    sources: a run of the tests makes its own.
    """
    key = _digest(case, dtype, seed, gradients)
    if key not in _truths:
        folder = os.environ.get("VDCORE_TESTING_CACHE")
        path = Path(folder) / f"{key}.pt" if folder else None
        if path is not None and path.exists():
            exact, forms = torch.load(path, weights_only=True)
            _truths[key] = exact, [{name: Errors(*e) for name, e in form.items()} for form in forms]
        else:
            _truths[key] = exact, forms = _compute(case, dtype, seed, gradients)
            if path is not None:
                fresh = path.with_suffix(f".{os.getpid()}")
                torch.save((exact, [{name: tuple(e) for name, e in form.items()} for form in forms]), fresh)
                fresh.replace(path)  # another process sees a whole file or none
    return _truths[key]


def forget() -> None:
    """Drops what :func:`truth` keeps in this process."""
    _truths.clear()


def draws(case: Case) -> range:
    """Seeds that errors are pooled over: 4; more where a gradient holds few values (a gate's is one number), and twice
    as many where few values are much larger than the others, as are their errors."""
    smallest = min((x.numel() for x in case.inputs().leaves.values() if x.numel()), default=LEAST_VALUES)
    least = LEAST_DRAWS * (2 if case.values == "outliers" else 1)
    return range(max(least, min(MOST_DRAWS, -(-LEAST_VALUES // smallest))))


def judge(
    case: Case,
    backend: str | None,
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "contiguous",
    device: str = "cpu",
    gradients: bool = True,
    every: int = 1,
) -> dict[str, Ratio]:
    """Error ratios of a backend on a case, by result's name.

    Args:
        every: PyTorch's errors are pooled over all :func:`draws`, the backend's over every so many of them.
    """
    function, seeds = getattr(vdcore, case.op), draws(case)
    truths = [truth(case, dtype, seed, gradients=gradients) for seed in seeds]
    ours: dict[str, list[Errors]] = {}
    dtypes = {}
    for seed in seeds[::every]:
        inputs = case.inputs(dtype, seed=seed, requires_grad=gradients, layout=layout, device=device)
        found = run(inputs, function, gradients=gradients, layout=layout, backend=backend).named()
        for name, x in found.items():
            ours.setdefault(name, []).append(errors(x, truths[seed][0][name]))
            dtypes[name] = x.dtype
    over_draws = {name: pooled(found) for name, found in ours.items()}
    largest = max((e.scale for name, e in over_draws.items() if not name.startswith("output ")), default=0.0)
    ratios = {}
    for name, mine in over_draws.items():
        forms = [pooled([forms[i][name] for _, forms in truths]) for i in range(len(truths[0][1]))]
        gradient = not name.startswith("output ")
        if gradient and mine.scale < NOTHING * largest:
            mine = mine._replace(scale=largest)
        ratios[name] = ratio(mine, forms, dtypes[name], gradient=gradient)
    return ratios


def check(case: Case, backend: str | None, dtype: torch.dtype = torch.float32, **kwargs: Any) -> dict[str, Ratio]:
    """As :func:`judge`; an ``AssertionError`` where the rule is broken."""
    ratios = judge(case, backend, dtype, **kwargs)
    broken = {name: r for name, r in ratios.items() if not r.worst <= 1}
    if broken:
        raise AssertionError(f"{case} on {backend} in {dtype}: error over what is allowed (maximum, rms): {broken}")
    return ratios
