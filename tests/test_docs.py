"""README and docs/: every page is reachable, every link leads somewhere, tables and examples are those of the code."""

import re
from pathlib import Path

import pytest

from vdcore_bench.report import readme

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("**/*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "results" / "README.md", *DOCS]
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SOURCES = [
    path
    for folder in ("vdcore", "bench", "kernels", "csrc", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
]


def name(page):
    return str(page.relative_to(ROOT))


def links(page):
    """The relative targets of a page's links and pictures, as (file, anchor)."""
    found = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text()))
    return [
        ((page.parent / path).resolve() if path else page, anchor)
        for path, _, anchor in (target.partition("#") for target in found if "://" not in target)
    ]


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target, anchor in links(page):
        assert target.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(target), f"{name(target)} has no heading #{anchor}"


def test_every_page_can_be_reached_from_the_readme():
    reached, ahead = set(), [README]
    while ahead:
        page = ahead.pop()
        if page not in reached:
            reached.add(page)
            ahead += [target for target, _ in links(page) if target.suffix == ".md"]
    assert not set(PAGES) - reached


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", [README, *DOCS], ids=name)
def test_tables_are_made_from_what_is_committed(page):
    """Run `vdcore bench --readme README.md` after a change of results or of what backends have."""
    assert readme.fill(page.read_text(), ROOT) == page.read_text()


@pytest.mark.parametrize("table", readme.TABLES)
def test_every_table_has_a_place(table):
    assert sum(page.read_text().count(f"<!-- table:{table} -->") for page in PAGES) == 1


def variables_read():
    """Environment variables of ours that any source reads or sets."""
    access = re.compile(r"""(?:environ(?:\.\w+\(|\[)|getenv\()\s*["'](VDCORE_\w+)""")
    return {found for path in [*SOURCES, ROOT / "setup.py"] for found in access.findall(path.read_text())}


def test_every_environment_variable_is_documented():
    rows = re.findall(r"^\| `(VDCORE_\w+)` \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(variables_read())


def hazards():
    """Number -> cells of the table."""
    lines = (ROOT / "docs" / "hazards.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d+ \|", line)]
    return {int(row[0]): row for row in rows}


def test_hazards_are_numbered_without_gaps():
    assert list(hazards()) == list(range(1, len(hazards()) + 1))


def test_hazards_that_tests_cite_are_in_the_table_beside_the_test():
    cited = re.compile(r"\bhazards? (\d+(?:(?:, | and )\d+)*)", re.IGNORECASE)
    table, found = hazards(), 0
    for path in (ROOT / "tests").rglob("test_*.py"):
        for numbers in cited.findall(path.read_text()):
            for number in map(int, re.findall(r"\d+", numbers)):
                found += 1
                assert f"/{path.name})" in table[number][3], f"hazard {number} is cited in {name(path)}"
    assert found > 20


def test_tests_that_hazards_name_exist():
    for row in hazards().values():
        files = "".join((ROOT / "docs" / target).read_text() for target in re.findall(r"\]\(([^)]+)\)", row[3]))
        for test in re.findall(r"`(test_\w+)`", row[3]):
            assert f"def {test}(" in files, f"hazard {row[0]}: {test}"
