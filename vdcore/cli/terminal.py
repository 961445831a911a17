"""What commands share: progress on the terminal, errors in one line, and common options."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

DEVICE = Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")]
THREADS = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's.")]
TRAIN_OUT = Path("out/train")  # where train leaves its checkpoint, and sample looks for it


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress bars on a terminal. Elsewhere they are disabled, and the caller prints a line now and then instead."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True, highlight=False, markup=False)
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Remaining())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that a user can act on become one line and exit code 1; any other exception is a bug, and shown whole."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"vdcore: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def set_threads(number: int | None) -> None:
    import torch

    if number is not None:
        torch.set_num_threads(number)
