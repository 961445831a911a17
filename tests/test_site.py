"""The site builds without a warning, needs nothing from the network, and every link in it leads somewhere."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # builds the site, which `.ci/run` does as well


class Links(HTMLParser):
    """What a page shows by itself, what it links to, and the anchors in it."""

    def __init__(self, page):
        super().__init__()
        self.loaded, self.linked, self.anchors = [], [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.loaded.append(given["href"])
        if tag == "a" and given.get("href"):
            self.linked.append(given["href"])
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-4000:]
    return {page: Links(page) for page in folder.rglob("*.html")}


def test_nothing_is_loaded_from_the_network(site):
    for page, links in site.items():
        assert not [source for source in links.loaded if "://" in source], page.name


def test_every_link_leads_somewhere(site):
    found = 0
    for page, links in site.items():
        for link in [*links.linked, *links.loaded]:
            if "://" in link or page.name == "404.html":
                continue
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or target not in site or anchor in site[target].anchors, f"{page.name}: {link}"
            found += 1
    assert found > 500


def test_every_public_name_is_in_the_reference(site):
    import vdcore

    anchors = set().union(*(links.anchors for page, links in site.items() if page.parent.name == "reference"))
    listed = {anchor.rpartition(".")[2] for anchor in anchors}
    assert not {name for name in vdcore.__all__ if not name.startswith("_")} - listed
