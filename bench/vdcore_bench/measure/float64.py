"""Running a host's model in float64 from end to end, for a reference to judge results by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS: dict[Any, Callable[..., Any]] = {
    Tensor.float: Tensor.double,
    Tensor.half: Tensor.double,
    Tensor.bfloat16: Tensor.double,
}


class Float64(TorchFunctionMode):
    """Inside, whatever a model casts to a narrower dtype is cast to float64 instead.

    Hosts compute norms, rotations and embeddings of the timestep in float32 also where the model is in float64: with
    their roundings the run would be no reference.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _CASTS:
            return _CASTS[func](*args, **kwargs)
        args = [_widen(x) for x in args]
        kwargs = {name: _widen(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def _widen(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x in _NARROW else x
