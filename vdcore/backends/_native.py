"""The compiled module, if it is there."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

import torch


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("vdcore._native")
    except ImportError as error:
        return None, f"vdcore was installed without its compiled module ({error})"
    # torch's own threads, which wait at a processor for more work after every torch operator.
    module.share_openmp(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return module, None


def native() -> ModuleType:
    """The module ``vdcore._native``; only after :func:`why_no_native` has returned None."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def why_no_native() -> str | None:
    """The reason why there is no compiled module, or None."""
    return _load()[1]
