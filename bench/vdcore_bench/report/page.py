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
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-weight: 600; } h2 { margin-top: 2.5rem; } h3 { margin: 1.4rem 0 .4rem; font-size: 1rem; }
h2 a { color: inherit; } .scroll { overflow-x: auto; } .two { display: flex; flex-wrap: wrap; gap: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--dim); font-weight: 500; }
th:first-child, td:first-child, table.text td, table.text th { text-align: left; }
table.text td { white-space: normal; vertical-align: top; }
img { max-width: 100%; background: white; border-radius: 4px; } img.pixels { image-rendering: pixelated; }
p.note { color: var(--dim); max-width: 90ch; } .yes { color: #2a8a4a; } .no { color: #c22; font-weight: 600; }
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
        f"<style>{STYLE}</style></head><body>\n<h1>{escaped(headline or title)}</h1>"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def heading(text: str, level: int = 2, anchor: str = "") -> str:
    where = f' id="{anchor}"' if anchor else ""
    return f"<h{level}{where}>{escaped(text)}</h{level}>"


def note(text: str) -> str:
    """A dim paragraph; nothing for an empty text."""
    return f'<p class="note">{escaped(text)}</p>' if text else ""


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
