"""Every script in examples/ runs and shows what its docstring says, with small arguments."""

import re
import runpy
from pathlib import Path

import pytest

from vdcore.video import read_clip

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(capsys):
    def run(name, *arguments):
        runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([str(a) for a in arguments])
        return capsys.readouterr().out

    return run


def test_swap_in(script):
    output = script("swap_in", "--layers", 1, "--latent", 8, "--calls", 1)
    assert "bit for bit as before after swap_out: yes" in output and "Attention" in output
    difference, largest = map(float, re.search(r"difference (\S+) of values up to (\S+)", output).groups())
    assert difference < 1e-4 * largest


def test_same_video(script, tmp_path):
    output = script("same_video", "--frames", 5, "--steps", 1, "--out", tmp_path / "same.png")
    decibels = re.search(r"PSNR (\S+) dB", output).group(1)
    assert float(decibels) > 100 and (tmp_path / "same.png").is_file()
    changed = script("same_video", "--frames", 5, "--steps", 1, "--window", 0, "--out", tmp_path / "window.png")
    assert float(re.search(r"PSNR (\S+) dB", changed).group(1)) < 80


@pytest.mark.parametrize("name", ["animatediff", "svd", "wan"])
def test_swap_pipelines(script, name):
    output = script("swap_pipelines", name, "--frames", 5, "--steps", 1)
    assert name in output and "served: " in output
    assert float(re.search(r"PSNR (\S+) dB", output).group(1)) > 100


def test_windowed_wan(script):
    """Dense is dense; what sees less changes the result more."""
    output = script("windowed_wan", "dense", "neighborhood:3/5/5", "radial", "--calls", 1)
    rows = [line.strip("| ").split(" | ") for line in output.splitlines()[2:]]
    visible, change = ({row[0]: float(row[i].rstrip("%")) for row in rows} for i in (1, 3))
    assert visible["dense"] == 100 > visible["radial"] > visible["neighborhood:3/5/5"]
    assert change["dense"] < 1e-5 < change["radial"] < change["neighborhood:3/5/5"]


def test_memory_before(script):
    (row,) = (line.strip("| ").split(" | ") for line in script("memory_before", "--frames", 4).splitlines()[2:])
    host, naive, swapped = (float(cell.split()[0].replace(",", "")) for cell in row[1:])
    tokens, heads = 4 * 15 * 26, 12
    assert row[0] == "4" and host >= swapped > 0
    assert naive - host > 0.5 * heads * tokens**2 * 4 / 2**20  # the scores, which nobody else holds


def test_train_and_sample(script, tmp_path):
    checkpoint = tmp_path / "model.safetensors"
    output = script("train", "--steps", 12, "--width", 48, "--out", checkpoint)
    first, last = map(float, re.findall(r"loss (\S+)", output))
    assert 0 < last < first and str(checkpoint) in output
    script("sample", checkpoint, "--count", 2, "--frames", 12, "--steps", 1, "--out", tmp_path)
    assert read_clip(tmp_path / "samples.gif").shape == (3, 12, 4 * 24, 2 * 4 * 24)


def test_long_video(script):
    output = script("long_video", "--frames", 64, "--width", 32)
    assert re.findall(r"frame (\d+)", output) == [str(n) for n in range(8, 65, 8)]
    assert len(set(re.findall(r"cache (\S+) MiB", output))) == 1


def test_cache_sizes(script):
    lines = [line.split(" | ") for line in script("cache_sizes", "--frames", 48, "--width", 32).splitlines()[2:]]
    assert len(lines) == 6
    sizes = [int(line[2].replace(",", "")) for line in lines]
    assert sizes[0] == 2 * sizes[1] and sizes[1] < 2.1 * sizes[2] and sizes[3:] == sizes[:3]
    errors = [float(line[3].rstrip("%")) for line in lines]
    assert errors[0] == 0 and 0 < errors[1] < errors[2] < 1.5


def test_metric_table(script):
    rows = [line.strip("| ").split(" | ") for line in script("metric_table", "--clips", 2).splitlines()[2:]]
    assert len(rows) == 10 and [float(row[1]) for row in rows[:6]] == sorted(float(row[1]) for row in rows[:6])
    noise = [float(row[4]) for row in rows[6:8]]
    assert 1.2 < noise[0] / (1e4 * 0.02**2) < 2.3 and 1.2 < noise[1] / (1e4 * 0.05**2) < 2.3


def test_mean_flow(script):
    output = script("mean_flow", "--steps", 20, "--width", 48)
    first, last = map(float, re.findall(r"error (\S+)", output))
    assert 0 < last < first and "clips in one step" in output


@pytest.mark.slow
def test_on_ranks(script):
    output = script("on_ranks", "--ranks", "1,2", "--steps", 4, "--attention", "gated")
    (first, last), (again, other) = re.findall(r"loss (\S+) to (\S+),", output)
    assert (float(again), float(other)) == pytest.approx((float(first), float(last)), rel=1e-4)
    assert float(last) < float(first)


@pytest.mark.slow
def test_beside_ulysses(script):
    pytest.importorskip("diffusers")
    lines = [line for line in script("beside_ulysses").splitlines() if line.startswith("vdcore")]
    assert len(lines) == 2
    assert all(float(line.split()[-1]) < 1e-5 and line.split()[-2] == "1.0000" for line in lines)


def test_every_script_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = re.findall(r'script\("(\w+)"', Path(__file__).read_text())
    # What the commands take as module:function, and tests/bench runs.
    assert names == {*tested, "peer", "tiny_models", "tiny_pipelines"}
