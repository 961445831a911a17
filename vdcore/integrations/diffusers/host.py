"""Which diffusers this package knows, and how it recognises code that it was written against."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from vdcore.integrations.diffusers._fingerprints import FINGERPRINTS

try:
    import diffusers
except ImportError as error:  # pragma: no cover
    raise ImportError("vdcore.integrations.diffusers needs diffusers: pip install 'vdcore[models]'") from error

TESTED = ("0.42.1",)


def check_version(version: str | None = None) -> None:
    """Raises a ``RuntimeError`` that names the tested versions if diffusers has another major version."""
    version = diffusers.__version__ if version is None else version
    majors = {known.split(".")[0] for known in TESTED}
    if version.split(".")[0] not in majors:
        raise RuntimeError(
            f"swap_in: diffusers {version} has a major version that vdcore was not tested with; "
            f"tested: {', '.join(TESTED)}"
        )


@lru_cache(maxsize=1024)
def fingerprint(function: Callable[..., Any]) -> str:
    """Twelve hex digits of the source of a host's function: the same source, the same mathematics."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return f"version {diffusers.__version__}"
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def name_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def unknown_source(*functions: Callable[..., Any]) -> str | None:
    """A reason if one of a host's functions is not the one that its replacement was written against."""
    for function in functions:
        name, found = name_of(function), fingerprint(function)
        if found == FINGERPRINTS.get(name) or found in {f"version {version}" for version in TESTED}:
            continue
        return f"{name} of diffusers {diffusers.__version__} is not the one that vdcore was tested with"
    return None
