"""A figure: one claim, the numbers that were measured for it, and what they are compared with.

An experiment's ``run(out)`` writes its pictures into ``out`` and saves its figure there as ``NAME.json``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vdcore_bench.report.page import PICTURES, write_whole
from vdcore_bench.report.table import Table
from vdcore_bench.report.terminal import print_table


@dataclass(frozen=True)
class Figure:
    """What an experiment found.

    Args:
        name: of the experiment; the file is ``name.json``.
        claim: one sentence that the numbers may refute.
        numbers: measured, by name; JSON values, no NaN.
        compared_with: the numbers, or limits, that they are held against.
        passed: whether the claim holds.
        size: how small the experiment is: model, data, steps, time.
        files: names of pictures, tables and videos beside the JSON file.
        captions: what a picture shows, by its name.
        table: the measurements in full; a file ``name.md`` too.
    """

    name: str
    claim: str
    numbers: dict[str, Any]
    compared_with: dict[str, Any]
    passed: bool
    size: str
    files: list[str] = field(default_factory=list)
    table: Table | None = None
    captions: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> Figure:
        """Writes ``folder/name.json``, whole or not at all, and prints and writes the table; returns the figure.

        Raises:
            ValueError: if a number is not finite, a file is not in the folder, or a picture has no caption.
        """
        values: dict[str, Any] = dict(vars(self))
        if self.table is not None:
            values["table"] = {name: getattr(self.table, name) for name in ("header", "rows", "note")}
            values["files"] = list(dict.fromkeys([*self.files, f"{self.name}.md"]))
        text = json.dumps(_plain(f"Figure {self.name}", values), indent=1)
        folder.mkdir(parents=True, exist_ok=True)
        if self.table is not None:
            print_table(self.table)
            write_whole(folder / f"{self.name}.md", f"{self.table.note}\n\n{self.table.markdown()}")
        missing = [name for name in values["files"] if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"Figure {self.name}: files must be in {folder}, missing {', '.join(missing)}")
        unexplained = [name for name in self.files if Path(name).suffix in PICTURES and not self.captions.get(name)]
        if unexplained:
            raise ValueError(f"Figure {self.name}: captions must say what pictures show, missing {unexplained}")
        write_whole(folder / f"{self.name}.json", text + "\n")
        return self.load(folder / f"{self.name}.json")

    @classmethod
    def load(cls, path: Path) -> Figure:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"Figure.load: {path}: not JSON: {error}") from None
        names = {f.name for f in fields(cls)}
        if not isinstance(found, dict) or set(found) | {"table", "captions"} != names:
            raise ValueError(f"Figure.load: {path}: must hold {', '.join(sorted(names))}")
        table = found.pop("table", None)
        return cls(**found, table=None if table is None else Table.of(**table))


def _plain(where: str, value: Any) -> Any:
    """Numbers of torch and numpy as Python's, with the digits that mean something."""
    if isinstance(value, dict):
        return {str(key): _plain(f"{where}, {key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(where, item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: must be finite, got {value}")
        return float(f"{value:.6g}")
    if value is None or isinstance(value, (str, bool, int)):
        return value
    raise ValueError(f"{where}: must be a JSON value, got {type(value).__name__}")
