"""For programs that know no operator of vdcore: exported graphs in torch's own operators.

exported = torch.export.export(model, (), arguments).run_decompositions(vdcore.export.decompositions())
torch.onnx.export(exported, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.export import default_decompositions

from vdcore.ops.operator import DECOMPOSITIONS

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions``: torch's own, and every forward operator of vdcore by its
    reference, exact and N x N. Gradients are not in it."""
    return {**default_decompositions(), **DECOMPOSITIONS}
