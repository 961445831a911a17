"""What the site has beside the pages of docs/: see mkdocs.yml, which names this file as its hook.

README.md, CONTRIBUTING.md and the pages of bench/ become pages; the reference is made from docstrings, the gallery by
drawing masks; and whatever file of the repository a page links to is copied, or shown as a page if it is code.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import textwrap
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from vdcore import FrameMask, GridMask

ROOT = Path(__file__).parents[1]
# A file of the repository -> the page that it becomes.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/results/README.md": "unmeasured.md",
}
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cpp", ".cuh": "cpp", ".sh": "bash", ".toml": "toml"}
CODE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")

# Page of the reference -> its heading, and the objects on it, as mkdocstrings names them.
REFERENCE = {
    "attention": (
        "Attention",
        [
            *("spatial_attention", "temporal_attention", "video_attention", "gated_attention", "cross_attention"),
            *("tile_attention", "select_tiles", "kept_mass"),
        ],
    ),
    "rows": (
        "Patches, norms, gates",
        ["qk_norm_rope", "patchify", "unpatchify", "modulate", "gate_residual"],
    ),
    "values": ("Masks and tables", ["FrameMask", "GridMask", "TileLists", "QKNorm", "Rope", "axial_rope", "as_frames"]),
    "choosing": (
        "Choosing a backend",
        ["explain", "backends", "use_backend", "calls", "BackendError", "double_backward", "export.decompositions"],
    ),
    "integrations": (
        "Swapping into models",
        [
            "integrations.diffusers.swap_in",
            "integrations.diffusers.swap_out",
            "integrations.report.Report",
            "integrations.check.Check",
            "integrations.check.Seen",
            "integrations.wan.swap_in",
            "integrations.hunyuan_video.swap_in",
            "integrations.open_sora.swap_in",
            "integrations.comfyui.swap_in",
        ],
    ),
    "parallel": (
        "Several processes",
        [
            "parallel.shard",
            "parallel.switch",
            "parallel.gather",
            "parallel.video_attention",
            "parallel.average_gradients",
        ],
    ),
    "models": (
        "Models and sampling",
        [
            "models.VDiTConfig",
            "models.VDiT",
            "diffusion.Process",
            "diffusion.sample",
            "diffusion.roll",
            "video.read_clip",
            "video.write_video",
        ],
    ),
}

GALLERY = (
    ("FrameMask.full()", "All frames."),
    ("FrameMask.same_frame()", "The frame itself: spatial attention."),
    ("FrameMask.causal()", "The frame and all before it."),
    ("FrameMask.window(8)", "The frame and 8 before it."),
    ("FrameMask.symmetric(4)", "4 frames to either side."),
    ("FrameMask(future=0, chunk=4)", "Its chunk of 4 frames, and all chunks before it."),
    ("FrameMask(past=2, future=0, chunk=4, sink=4)", "Two chunks back, and always the first 4 frames."),
    ("FrameMask(past=8, future=0, sink=1)", "8 frames back, and always the first one."),
    ("FrameMask(past=4, future=0, shots=(0, 9, 16))", "4 frames back, and always the first one of its own shot."),
    ("FrameMask.teacher_forcing(12, chunk=3)", "Clean chunks up to its own; noisy: those before, and its own."),
)
# On a grid of 8 frames of 12 x 20 tokens.
GRIDS = (
    ("GridMask.window(3, 0, rows=2, columns=4)", "3 frames back, 2 rows and 4 columns to either side."),
    ("GridMask.neighborhood((5, 5, 9))", "NATTEN's definition: near a border the window keeps its size."),
    ("GridMask.tiles((3, 3, 3), (2, 4, 4))", "Sliding tile attention's: whole tiles of 2 x 4 x 4 tokens."),
    ("GridMask.radial(12, 20)", "Radial attention's: half the area where the distance in frames doubles."),
)


def reference(name: str) -> str:
    """A page of the reference."""
    heading, objects = REFERENCE[name]
    return "\n\n".join([f"# {heading}", *map(described, objects)]) + "\n"


def described(path: str) -> str:
    """mkdocstrings' directive for an object, under its public name."""
    options = {"heading": f"vdcore.{path}", "toc_label": path.rpartition(".")[2] if name_is_enough(path) else path}
    if path.endswith("Report"):  # made by swap_in, not by its users
        options |= {"show_signature": False, "members": ["left", "check", "dense"]}
    return f"::: {defined(path)}\n" + textwrap.indent("options: " + json.dumps(options), "    ")


def name_is_enough(path: str) -> bool:
    """No other object of the reference has the name."""
    every = [other for _, objects in REFERENCE.values() for other in objects]
    return sum(other.rpartition(".")[2] == path.rpartition(".")[2] for other in every) == 1


def defined(path: str) -> str:
    """Where an object of vdcore is defined: a room of an operator has the name of its function."""
    module, _, name = f"vdcore.{path}".rpartition(".")
    found = getattr(importlib.import_module(module), name)
    return f"{found.__module__}.{found.__qualname__}"


def gallery() -> tuple[str, dict[str, bytes]]:
    """The page of masks, and its pictures."""
    lines = [
        "# Masks in pictures",
        "",
        "Rows are query frames, columns key frames, 24 of each; a dark cell is visible. Density is the visible share of"
        " all pairs, and time is proportional to it. [What the arguments mean](operators.md#masks).",
        "",
    ]
    pictures = {}
    for number, (code, meaning) in enumerate(GALLERY):
        mask = eval(code, {"FrameMask": FrameMask})
        picture = f"pictures/mask-{number}.png"
        pictures[picture] = drawn(mask.visible(24).numpy())
        lines += [
            f"## `{code}`",
            "",
            f"{meaning} Density over 24 frames: {100 * mask.density(24):.0f} %.",
            "",
            f"![{code}]({picture}){{ width=240 }}",
            "",
        ]
    lines += [
        "## Windows in frames, rows and columns",
        "",
        "Left: the visible share between frames. Right: what three tokens see in every key frame, of 8 of 12 x"
        " 20 tokens. [What they are](sparse.md).",
        "",
    ]
    for number, (code, meaning) in enumerate(GRIDS):
        grid = eval(code, {"GridMask": GridMask})
        picture, out = f"pictures/grid-mask-{number}.png", io.BytesIO()
        grid.show(out, 8, 12, 20)
        pictures[picture] = out.getvalue()
        share = 100 * grid.density(8, 12, 20)
        lines += [f"### `{code}`", "", f"{meaning} Density: {share:.0f} %.", "", f"![{code}]({picture})", ""]
    return "\n".join(lines), pictures


def drawn(visible) -> bytes:
    """A boolean matrix as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(2.6, 2.6), layout="constrained")
    axes.imshow(visible, cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest")
    axes.set_xlabel("key frame")
    axes.set_ylabel("query frame")
    out = io.BytesIO()
    figure.savefig(out, dpi=144, metadata={"Software": None})
    pyplot.close(figure)
    return out.getvalue()


class Site:
    """The pages of one build, and the files that they turned out to need."""

    def __init__(self, config: MkDocsConfig, files: Files) -> None:
        self.config, self.files = config, files

    def add(self, uri: str, content: str | bytes) -> None:
        if self.files.get_file_from_path(uri) is None:
            self.files.append(File.generated(self.config, uri, content=content))

    def place(self, path: Path) -> str | None:
        """The site's name of a file of the repository, which is added if it is not there yet; None: it has none."""
        name = path.relative_to(ROOT).as_posix()
        if name in PAGES:
            return PAGES[name]
        if name.startswith("docs/") and path.suffix != ".py":
            return name[len("docs/") :]
        if path.suffix in (".png", ".svg"):
            self.add(f"pictures/{path.name}", path.read_bytes())
            return f"pictures/{path.name}"
        if path.suffix == ".ipynb":  # to download
            self.add(f"sources/{name}", path.read_bytes())
            return f"sources/{name}"
        if path.suffix in LANGUAGES:
            shown = f"sources/{name}.md"
            self.add(shown, f"# {name}\n\n```{LANGUAGES[path.suffix]}\n{path.read_text()}```\n")
            return shown
        return None

    def relinked(self, text: str, source: Path, uri: str) -> str:
        """The page with links to files of the repository turned into links of the site."""

        def target(found: re.Match[str]) -> str:
            words, link, anchor = found[1], found[2], found[3] or ""
            if "://" in link or link.startswith("mailto:"):
                return found[0]
            place = self.place((source.parent / link).resolve())
            if place is None:
                return words  # a folder
            return f"[{words}]({os.path.relpath(place, os.path.dirname(uri) or '.')}{anchor})"

        parts = CODE.split(text)
        parts[::2] = [LINK.sub(target, part) for part in parts[::2]]
        return "".join(parts)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/, and what pages link to."""
    site = Site(config, files)
    for name, uri in PAGES.items():
        site.add(uri, site.relinked((ROOT / name).read_text(), ROOT / name, uri))
    for name in REFERENCE:
        site.add(f"reference/{name}.md", reference(name))
    page, pictures = gallery()
    site.add("masks.md", page)
    for uri, picture in pictures.items():
        site.add(uri, picture)
    for path in sorted((ROOT / "docs").rglob("*.md")):  # what they link to has to be known before pages are read
        site.relinked(path.read_text(), path, path.relative_to(ROOT / "docs").as_posix())
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the pages of docs/."""
    source = ROOT / "docs" / page.file.src_uri
    if not source.exists():
        return markdown
    return Site(config, files).relinked(markdown, source, page.file.src_uri)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Nothing comes from the network. Without that script there is no search where pages are opened as files."""
    for page in Path(config.site_dir).rglob("*.html"):
        text = page.read_text()
        page.write_text(text.replace('<script src="https://unpkg.com/iframe-worker/shim"></script>', ""))
