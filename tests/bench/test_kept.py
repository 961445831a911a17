"""What masks keep of a model: the report's numbers as rows, tables, pictures and a page; the command line."""

import pytest
import torch
from typer.testing import CliRunner

from vdcore.cli.commands import app
from vdcore.integrations.masks import measure_masks
from vdcore.models import VDiT, VDiTConfig
from vdcore_bench.measure.journal import FILE, Journal, Watch, load, parse
from vdcore_bench.report import results
from vdcore_bench.suites import kept

MASKS = ("frames:1", "window:1/1/1/1")


def subject():
    torch.manual_seed(0)
    model = VDiT(VDiTConfig(width=24, depth=2, heads=2, attention="full", position="rope")).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model, {"video": torch.randn(1, 4, 3, 8, 8), "timestep": torch.tensor([500.0])}


def broken():
    return "no model"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / FILE
    journal = Journal(path)
    kept.run("tiny", *subject(), kept.Settings(MASKS, rounds=2, keep=0.5), journal, Watch())
    journal.close()
    return parse(path.read_text())


def test_rows_are_the_reports_numbers(rows):
    report = measure_masks(*subject(), MASKS, rounds=0)
    (model,) = kept.models(rows)
    assert model.layers == report.layers and set(model.masks) == set(MASKS) and model.keep == 0.5
    for metric, name in ((kept.MASS, "mass"), (kept.WORST, "worst"), (kept.ERROR, "error")):
        for mask in MASKS:
            want = {(x.layer, x.head): getattr(x, name) for x in report.of(mask)}
            assert model.heads(metric, mask, min) == pytest.approx(want, abs=1e-6)
            assert model.density(mask) == report.of(mask)[0].density
    assert len(rows) == len(MASKS) + 2 * 2 * len(MASKS) * 3 + 2 * (1 + len(MASKS)) + 2 * 2
    assert all(row.status == "ok" and row.shape["T"] == 3 and row.shape["rows"] == 4 for row in rows)
    assert len({row.key() for row in rows}) == len(rows)


def test_tables_and_page(rows):
    every, choice = results.kept_tables(rows)
    assert every.header == kept.HEADER and {row[0] for row in every.rows} == set(MASKS)
    assert every.title == "tiny: 3 frames of 4 x 4 tokens" and "keep 50% in every head" in choice.title
    assert len(choice.rows) == 3 and choice.rows[-1][0] == "all"
    (heads,) = results.head_tables(rows)
    assert len(heads.rows) == 4 and all(cell.count("/") == 2 for row in heads.rows for cell in row[2:])
    assert [table.title for table in results.measured("", rows)] == [every.title, choice.title]
    (name, (title, picture)), *more = results.pictures.draw(rows).items()
    assert (name, more) == ("kept", []) and "tiny" in title and picture.startswith(b"\x89PNG")
    page = results.report(rows, results.pictures.draw(rows))
    (model,) = kept.models(rows)
    chosen = [name for names in model.choices().values() for name in names]
    masked = sum(name != kept.DENSE for name in chosen)
    assert f"tiny: {masked} of {len(chosen)} heads are recommended a mask, the cheapest that keeps 50%" in page
    assert every.title in page and heads.title in page


def test_the_command_measures_a_function_of_the_users(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("vdcore_bench.measure.machine.needs_relaunch", lambda: False)
    given = [
        "masks",
        "--model",
        "test_kept:subject",
        "--mask",
        ",".join(MASKS),
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
    ]
    found = CliRunner().invoke(app, given)
    assert found.exit_code == 0, found.output
    assert "test_kept:subject: 3 frames of 4 x 4 tokens" in found.output
    assert {row.case for row in load(str(tmp_path)) if row.metric == kept.DENSITY} == set(MASKS)
    assert (tmp_path / "kept.png").exists() and "tokens" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "given, words",
    [
        (["--mask", "sparse"], "neighborhood:FRAMES/ROWS/COLUMNS"),
        (["--model", "nothing"], "known are a checkpoint of vdcore train, module:function, vdit-full"),
        (["--model", "no_such:function"], "expected module:function"),
        (["--model", "test_kept:missing"], "has no function 'missing'"),
        (["--model", "test_kept:broken"], "must return a model and its inputs"),
        (["--level", "2"], "not shares such as 0.9,0.5"),
        (["--call", "x"], "not numbers such as 0,3"),
    ],
)
def test_what_is_not_known(given, words, tmp_path, monkeypatch):
    monkeypatch.setattr("vdcore_bench.measure.machine.needs_relaunch", lambda: False)
    found = CliRunner().invoke(app, ["masks", *given, "--out", str(tmp_path)])
    assert found.exit_code == 2
    assert "".join(words.split()) in "".join(found.output.replace("│", "").split())
