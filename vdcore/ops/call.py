"""A call: what a backend is asked to do, checked and with all defaults filled in. One dataclass per operator.

A call crosses a torch operator's boundary, which takes tensors and numbers only. How its fields do that follows from
their types: every type has a :class:`Codec` in :data:`CODECS`. A new argument is one more field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, get_origin, get_type_hints

import torch
from torch import Tensor

from vdcore.grid_mask import GridMask, HeadMasks, Steps
from vdcore.mask import FAR, FrameMask, bounded
from vdcore.norm import QKNorm
from vdcore.rope import Rope

Triple = tuple[Tensor, Tensor, Tensor]


class QKV:
    """q ``(B, T, S, H, D)``, k and v ``(B, T_k, S, G, D)``; or views of a packed q ``(B, T, S, 3, H, D)``.

    These are made when somebody asks for them: on few tokens they cost as much as a kernel, and the CPU engine and
    autograd take what is packed.
    """

    __slots__ = ("_views", "main", "packed")

    def __init__(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> None:
        self.main = q  # the packed tensor, or q
        self.packed: Tensor | None = None
        self._views: Triple | None = None
        if k is None or v is None:
            self.packed = q
        else:
            self._views = q, k, v

    @property
    def views(self) -> Triple:
        """q, k, v."""
        if self._views is None:
            q, k, v = self.main.unbind(3)
            self._views = q, k, v
        return self._views

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """B, T, S, H, D, T_k, G."""
        if self._views is None:
            B, T, S, _, H, D = self.main.shape
            return B, T, S, H, D, T, H
        q, k, _ = self._views
        B, T, S, H, D = q.shape
        return B, T, S, H, D, k.shape[1], k.shape[3]

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """q, k and v as they were given."""
        return self.views if self.packed is None else (self.main, None, None)


@dataclass(frozen=True)
class Codec:
    """How a field of one type becomes tensors and numbers, and is made of them again.

    Args:
        tensors: their names; ``{field}`` is the field's name and ``{prefix}`` what stands in it before its last word
            (``text_`` of ``text_norm``). ``?``: may be None.
        numbers: declarations of the others in a torch schema.
        split: the field's tensors; None: it is one.
        describe: the field's numbers; None: it is one.
        build: the field, of its tensors and numbers; None: it is the one.
    """

    tensors: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    split: Callable[[Any], tuple[Tensor | None, ...]] | None = None
    describe: Callable[[Any], tuple[Any, ...]] | None = None
    build: Callable[..., Any] | None = None


def _triple(optional: str) -> Codec:
    def build(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> Any:
        return None if q is None else (q, k, v)

    names = tuple(f"{{field}}_{x}{optional}" for x in "qkv")
    return Codec(names, split=lambda x: (None, None, None) if x is None else x, build=build)


def mask_numbers(mask: FrameMask) -> list[int]:
    """past, future (-1: all), chunk, sink, clean, then shots."""
    past, future = mask.past, mask.future
    return [
        -1 if past is None or past >= FAR else past,
        -1 if future is None or future >= FAR else future,
        *map(bounded, (mask.chunk, mask.sink, mask.clean)),
        *(shot for shot in mask.shots if shot < FAR),
    ]


def _build_mask(numbers: list[int]) -> FrameMask:
    past, future, chunk, sink, clean, *shots = numbers
    return FrameMask(None if past < 0 else past, None if future < 0 else future, chunk, sink, clean, tuple(shots))


# Of a group of heads: (heads, tile * 3, shift of the grid, shift of frames, sink, *count and numbers of frames,
# *count and steps of rows, *count and steps of columns).
def grid_numbers(heads: int, mask: GridMask) -> list[int]:
    found = [heads, *mask.tile, int(mask.border == "shift"), int(mask.frame_border == "shift")]
    found.append(mask.sink)
    for part in (mask_numbers(mask.frames), *(_flat(steps) for steps in (mask.row_steps, mask.column_steps))):
        found += [len(part), *part]
    return found


def _flat(steps: Steps) -> list[int]:
    return [x for step in steps for x in step]


# A list that stands for nothing. AOTInductor hands an operator None for one that is empty.
_NONE = [0]


def _head_masks_numbers(mask: FrameMask | HeadMasks) -> tuple[list[int], list[int]]:
    if isinstance(mask, FrameMask):
        return mask_numbers(mask), _NONE
    found = list(mask.grid)
    for heads, one in mask.groups:
        found += grid_numbers(heads, one)
    return _NONE, found


def _build_head_masks(frames: list[int], grids: list[int]) -> FrameMask | HeadMasks:
    return _build_mask(frames) if grids == _NONE else _read_head_masks(tuple(grids))


@lru_cache(maxsize=256)
def _read_head_masks(numbers: tuple[int, ...]) -> HeadMasks:
    left = list(reversed(numbers))

    def some(count: int) -> list[int]:
        return [left.pop() for _ in range(count)]

    def radius() -> int | tuple[int, ...] | None:
        """By distance, of its steps."""
        flat = some(left.pop())
        steps = list(zip(flat[::2], flat[1::2]))
        if len(steps) == 1:
            return None if steps[0][1] < 0 else steps[0][1]
        radii = [r for (first, r), (end, _) in pairwise(steps) for _ in range(first, end)]
        return (*radii, steps[-1][1])

    rows, columns = some(2)
    groups = []
    while left:
        heads, *tile, shift, frame_shift, sink = some(7)
        frames = _build_mask(some(left.pop()))
        by_row, by_column = radius(), radius()
        border, frame_border = ("shift" if x else "clip" for x in (shift, frame_shift))
        groups.append((heads, GridMask(frames, by_row, by_column, tuple(tile), border, frame_border, sink)))  # type: ignore[arg-type]
    return HeadMasks((rows, columns), tuple(groups))


def _norm_tensors(norm: QKNorm | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if norm is None else (norm.q_weight, norm.k_weight, norm.q_bias, norm.k_bias)


def _norm_numbers(norm: QKNorm | None) -> tuple[str, float]:
    return ("", 0.0) if norm is None else (f"{norm.kind}/{norm.over}", norm.eps)


def _build_norm(q_weight: Any, k_weight: Any, q_bias: Any, k_bias: Any, name: Any, eps: float) -> QKNorm | None:
    if not name:
        return None
    kind, over = name.split("/")
    return QKNorm(q_weight, k_weight, kind, over, eps, q_bias, k_bias)


CODECS: dict[Any, Codec] = {
    Tensor: Codec(("{field}",)),
    Tensor | None: Codec(("{field}?",)),
    Triple: _triple(""),
    Triple | None: _triple("?"),
    QKV: Codec(("q", "k?", "v?"), split=QKV.tensors, build=QKV),
    FrameMask: Codec(numbers=("int[] {field}",), describe=lambda x: (mask_numbers(x),), build=_build_mask),
    FrameMask | HeadMasks: Codec(
        numbers=("int[] {field}", "int[] {field}_grids"), describe=_head_masks_numbers, build=_build_head_masks
    ),
    QKNorm | None: Codec(
        ("{prefix}q_weight?", "{prefix}k_weight?", "{prefix}q_bias?", "{prefix}k_bias?"),
        ("str {field}", "float {field}_eps"),
        _norm_tensors,
        _norm_numbers,
        _build_norm,
    ),
    Rope | None: Codec(
        ("{prefix}cos?", "{prefix}sin?"),
        ("str {field}",),
        lambda x: (None, None) if x is None else (x.cos, x.sin),
        lambda x: ("" if x is None else x.style,),
        lambda cos, sin, style: Rope(cos, sin, style) if style else None,
    ),
    int: Codec(numbers=("SymInt {field}",)),
    float: Codec(numbers=("float {field}",)),
    bool: Codec(numbers=("bool {field}",)),
    str: Codec(numbers=("str {field}",)),
    tuple[int, int]: Codec(numbers=("SymInt[] {field}",), describe=lambda x: (list(x),), build=lambda x: tuple(x)),
    tuple[int, int, int]: Codec(numbers=("SymInt[] {field}",), describe=lambda x: (list(x),), build=lambda x: tuple(x)),
}


@dataclass
class Call:
    """What all calls share; a subclass is a dataclass of the operator's arguments.

    Args:
        grad: gradients will be wanted, so that forward keeps what backward needs. Whoever runs the call says so.
    """

    op: ClassVar[str]  # the public function
    OUTPUTS: ClassVar[int] = 1
    SAVES_OUTPUTS: ClassVar[bool] = False
    PASSED: ClassVar[dict[str, int]] = {}  # tensor -> output whose gradient is the tensor's: no backend is asked for it

    NAMES: ClassVar[tuple[str, ...]]  # of the tensors
    SCHEMA: ClassVar[tuple[str, ...]]  # declarations: of the tensors, then of the numbers
    _build: ClassVar[Callable[..., Any]]
    _again: ClassVar[Callable[..., Any]]

    grad: bool = field(init=False, default=False)

    def __init_subclass__(cls) -> None:
        """Names, schema and the methods below from the fields, as dataclass makes ``__init__``."""
        hints = get_type_hints(cls)
        tensors: list[str] = []
        numbers: list[str] = []
        split, describe, build, rest, again = [], [], [], [], []
        here: dict[str, Any] = {"cls": cls}
        for name, kind in hints.items():
            if name == "grad" or get_origin(kind) is ClassVar:
                continue
            codec = CODECS[kind]
            here |= {f"split_{name}": codec.split, f"describe_{name}": codec.describe, f"build_{name}": codec.build}
            values = [f"tensors[{len(tensors) + i}]" for i in range(len(codec.tensors))]
            values += [f"numbers[{len(numbers) + i}]" for i in range(len(codec.numbers))]
            build.append(f"build_{name}({', '.join(values)})" if codec.build else values[0])
            if codec.tensors:
                split.append(f"*split_{name}(self.{name})" if codec.split else f"self.{name}")
                again.append(build[-1])
            else:
                again.append(f"numbers[{len(numbers)}]")
            if codec.numbers:
                describe.append(f"*describe_{name}(self.{name})" if codec.describe else f"self.{name}")
                rest += [f"self.{name}", *["None"] * (len(codec.numbers) - 1)] if not codec.tensors else describe[-1:]
            parts = {"field": name, "prefix": name[: name.rfind("_") + 1]}
            tensors += [text.format(**parts) for text in codec.tensors]
            numbers += [text.format(**parts) for text in codec.numbers]
        cls.NAMES = tuple(name.rstrip("?") for name in tensors)
        cls.SCHEMA = tuple(f"Tensor{'?' if x.endswith('?') else ''} {x.rstrip('?')}" for x in tensors) + tuple(numbers)

        def function(arguments: str, result: str) -> Callable[..., Any]:
            return eval(f"lambda {arguments}: {result}", here)

        for name, method in {
            "tensors": function("self", f"({''.join(f'{x}, ' for x in split)})"),
            "numbers": function("self", f"({''.join(f'{x}, ' for x in describe)})"),
            "rest": function("self", f"({''.join(f'{x}, ' for x in rest)})"),
            "_build": staticmethod(function("tensors, numbers", f"cls({', '.join(build)})")),
            "_again": staticmethod(function("tensors, numbers", f"cls({', '.join(again)})")),
        }.items():
            setattr(cls, name, method)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of ``NAMES``."""
        raise NotImplementedError

    def numbers(self) -> tuple[Any, ...]:
        """All that is no tensor, in the order of ``SCHEMA``."""
        raise NotImplementedError

    @classmethod
    def build(cls, tensors: tuple[Any, ...], numbers: tuple[Any, ...], grad: bool) -> Any:
        """The call that these came from."""
        call = cls._build(tensors, numbers)
        call.grad = grad
        return call

    def rest(self) -> tuple[Any, ...]:
        """As :meth:`numbers`; a field without tensors stands as it is, and need not be built again."""
        raise NotImplementedError

    @classmethod
    def again(cls, tensors: tuple[Any, ...], rest: tuple[Any, ...]) -> Any:
        """The call, with gradients wanted, that these came from."""
        call = cls._again(tensors, rest)
        call.grad = True
        return call

    @property
    def main(self) -> Tensor:
        """The first tensor: its device and dtype are the call's."""
        x = self.tensors()[0]
        assert x is not None
        return x

    @property
    def is_dense(self) -> bool:
        """It is attention over many tokens and nothing else: no mask, lengths, text, norm or rope."""
        return False

    @property
    def is_empty(self) -> bool:
        """There is nothing to compute with: no kernel need know what to do then."""
        return self.main.numel() == 0

    def empty_outputs(self) -> tuple[Tensor | None, ...]:
        """What forward fills: contiguous, whatever the strides of the inputs; None where it is not wanted."""
        raise NotImplementedError


def empty(like: Tensor, shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(*shape, dtype=dtype or like.dtype, device=like.device)


def empty_like(x: Tensor) -> Tensor:
    """Contiguous; half the time of :func:`empty`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@dataclass
class AttentionCall(Call):
    """Attention of q to k and v: out, and lse where it is asked for or needed by backward."""

    OUTPUTS: ClassVar[int] = 2
    SAVES_OUTPUTS: ClassVar[bool] = True

    qkv: QKV
    mask: FrameMask
    q_start: int
    lengths: Tensor | None
    scale: float
    norm: QKNorm | None
    rope: Rope | None
    return_lse: bool

    @property
    def q(self) -> Tensor:
        return self.qkv.views[0]

    @property
    def k(self) -> Tensor:
        return self.qkv.views[1]

    @property
    def v(self) -> Tensor:
        return self.qkv.views[2]

    @property
    def packed(self) -> Tensor | None:
        return self.qkv.packed

    @property
    def main(self) -> Tensor:
        return self.qkv.main

    @property
    def is_empty(self) -> bool:
        qkv = self.qkv
        return qkv.main.numel() == 0 or (qkv.packed is None and self.k.numel() == 0)
