"""One HTML page with everything in it, which opens without a network: style, sections, tables, pictures.

    page("vdcore benchmark", [heading("Operators"), note("Medians."), table.html(), image(path)])

Every part is a piece of HTML; plain text goes through :func:`note`, :func:`heading` or :func:`~.table.escaped`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

from vdcore_bench.report.table import Table, escaped

STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-weight: 600; } h2 { margin-top: 2.5rem; } h3 { margin: 1.4rem 0 .4rem; font-size: 1rem; }
h2 a { color: inherit; } .scroll { overflow-x: auto; } .two { display: flex; flex-wrap: wrap; gap: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--dim); font-weight: 500; }
th:first-child, td:first-child, table.text td, table.text th { text-align: left; }
table.text td { white-space: normal; vertical-align: top; }
img { max-width: 100%; background: white; border-radius: 4px; } img.pixels { image-rendering: pixelated; }
thead th, summary { cursor: pointer; }
th[aria-sort=ascending]::after { content: " ▲"; } th[aria-sort=descending]::after { content: " ▼"; }
p.note { color: var(--dim); max-width: 90ch; } p.said { font-size: 17px; max-width: 75ch; }
.yes { color: #2a8a4a; } .no { color: #c22; font-weight: 600; }
"""
# A click on a column's name sorts its table: by the number that a cell begins with, in its unit, else by its text.
SORT = """
const UNITS = {us: 1e-6, ms: 1e-3, s: 1, KiB: 1024, MiB: 1048576, GiB: 1073741824};
function key(row, column) {
  const text = row.cells[column].textContent.trim();
  const found = text.match(/^[~]?(-?[\\d.]+(?:e[-+]?\\d+)?)\\s*(us|ms|s|KiB|MiB|GiB)?/);
  return found ? [0, parseFloat(found[1]) * (UNITS[found[2]] || 1), text] : [text === "-" ? 2 : 1, 0, text];
}
document.querySelectorAll("thead th").forEach(th => th.addEventListener("click", () => {
  const table = th.closest("table"), body = table.tBodies[0], up = th.ariaSort !== "ascending";
  table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  th.ariaSort = up ? "ascending" : "descending";
  const rows = [...body.rows].map(row => [key(row, th.cellIndex), row]);
  rows.sort(([a], [b]) => (a[0] - b[0]) || (up ? 1 : -1) * (a[1] - b[1] || a[2].localeCompare(b[2])));
  body.append(...rows.map(([, row]) => row));
}));
"""
PICTURES = {".png": "image/png", ".gif": "image/gif"}  # suffixes of files that a page shows


def page(title: str, sections: Iterable[str], headline: str = "") -> str:
    """The document.

    Args:
        title: of the window, and above the page where there is no ``headline``.
        sections: pieces of HTML.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head><body>\n<h1>{escaped(headline or title)}</h1>"
        + "\n".join(sections)
        + f"\n<script>{SORT}</script>\n</body></html>\n"
    )


def heading(text: str, level: int = 2, anchor: str = "") -> str:
    where = f' id="{anchor}"' if anchor else ""
    return f"<h{level}{where}>{escaped(text)}</h{level}>"


def note(text: str) -> str:
    """A dim paragraph; nothing for an empty text."""
    return f'<p class="note">{escaped(text)}</p>' if text else ""


def said(sentences: Iterable[str]) -> str:
    """The paragraph that a reader in a hurry reads; nothing for no sentences."""
    text = " ".join(sentences)
    return f'<p class="said">{escaped(text)}</p>' if text else ""


def folded(title: str, content: str) -> str:
    """What opens at a click on its title."""
    return f"<details><summary>{escaped(title)}</summary>{content}</details>"


def titled(table: Table, level: int = 3) -> str:
    """A table below its title and its note."""
    return (heading(table.title, level) if table.title else "") + note(table.note) + table.html()


def image(picture: Path | bytes, title: str = "", pixels: bool = False) -> str:
    """A picture, embedded.

    Args:
        picture: a file with a suffix of :data:`PICTURES`, or a PNG.
        title: what it shows; empty: the file's name.
        pixels: enlarged without smoothing.
    """
    content, kind = (picture, PICTURES[".png"]) if isinstance(picture, bytes) else (picture.read_bytes(), "")
    if isinstance(picture, Path):
        title, kind = title or picture.name, PICTURES[picture.suffix]
    data, how = base64.b64encode(content).decode("ascii"), ' class="pixels"' if pixels else ""
    return f'<p><img{how} alt="{escaped(title)}" src="data:{kind};base64,{data}"></p>'


def write_whole(path: Path, text: str) -> None:
    """Atomic: readers see the old file or the new one."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
