"""Checkpoints: one safetensors file, whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vdcore.extras import need

KEY, FORMAT = "vdcore", "vdcore training 1"


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one of something else."""


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Path:
    """Atomic: readers see either the old or the new file.

    Args:
        path: folders are made.
        notes: whatever JSON holds, in the file's metadata.
    """
    write = need("safetensors.torch", "models", "checkpoint.save").save
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {KEY: json.dumps({"format": FORMAT, **notes})}  # one entry: equal checkpoints are equal bytes
    data = write({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and notes of a checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is none of ours, or not whole.
    """
    safetensors = need("safetensors", "models", "checkpoint.load")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path}: no such file")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint: {path}: not a whole safetensors file: {error}") from None
    notes = json.loads(metadata.get(KEY, "{}"))
    if notes.pop("format", None) != FORMAT:
        raise CheckpointError(f"checkpoint: {path}: expected the format {FORMAT!r}: not written by vdcore train")
    return tensors, notes


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix.``, without it."""
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}
