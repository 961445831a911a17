"""The Hopper kernel of frame attention without a GPU: right in every order, and mistakes in it show."""

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.compile(
    *("tests/emulator/*.cpp", "csrc/cuda/core/tensor_map.cu", "tests/build/hopper_kernel.cpp"), tools=["c++"]
)

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "tests" / "emulator").glob("*.cpp")), ROOT / "csrc/cuda/core/tensor_map.cu"]
KERNEL = ("cuda/frame_attention/forward_sm90.cuh", "cuda/frame_attention/plan_sm90.cuh")
FLAGS = ("-std=c++17", "-O1", "-DVDCORE_EMULATE", "-Wno-psabi")
INCLUDE = ("-I", ROOT / "csrc", "-I", ROOT / "tests")

# What is wrong, and the line that is replaced by others.
LOOP_WAIT = "        await_result();\n        values.release(cluster, lane);\n        shrink_result(shrink);\n"
KEY_ROWS = "        store_shared(shared.key_rows + pipeline.stage, box.rows);\n"
KEYS_TOLD = "        pipeline.expect(Plan::kKeyBytes);\n"
MISTAKES = {
    "keys are released while they are read": (
        "        await_scores<false>(s);\n        keys.release(cluster, lane);\n",
        "        keys.release(cluster, lane);\n        await_scores<false>(s);\n",
    ),
    "values are released while they are read": (
        LOOP_WAIT,
        "        values.release(cluster, lane);\n        await_result();\n        shrink_result(shrink);\n",
    ),
    "the result is touched while products add to it": (
        LOOP_WAIT,
        "        shrink_result(shrink);\n        await_result();\n        values.release(cluster, lane);\n",
    ),
    "values are not waited for": (
        "        values.await();\n        issue_result();\n",
        "        issue_result();\n",
    ),
    "no fence between registers and products": ("    wgmma_fence();\n", ""),
    "queries are replaced while they are read": (
        "    queries.claim();\n",
        "",
    ),
    "the other block of a cluster is not told that keys are free": (
        "keys.release(cluster, lane);",
        "keys.release({1, cluster.rank}, lane);",
    ),
    "a block of a cluster ends while the other one reaches for it": (
        "  if (cluster.size > 1) sync_cluster();\n}",
        "}",
    ),
    "both blocks of a cluster load the same half": ("half = cluster.rank; half", "half = 0; half"),
    "a descriptor that skips rows": ("(v + step * 16 * kRow", "(v + step * 8 * kRow"),
    "a window that begins a token late": ("c2(tile.start)", "c2(tile.start + 1)"),
    "what the kernel writes is loaded as if nobody did": ("load_written<Vec4>(other)", "load_global<Vec4>(other)"),
    "a stage is released before all lanes have read of it": (
        "    sync_warp();\n    if (lane < cluster.size)",
        "    if (lane < cluster.size)",
    ),
    "what runs on its own does not know of the mbarriers": ("    mbarrier_init_fence();\n", ""),
    "the blocks of a cluster do not wait for one another's mbarriers": (
        "  if (cluster.size > 1)\n    sync_cluster();\n  else\n    sync_block();\n",
        "  sync_block();\n",
    ),
    "the number of rows is stored behind the arrival that tells of it": (
        KEY_ROWS + KEYS_TOLD,
        KEYS_TOLD + KEY_ROWS,
    ),
    "the last columns are hidden, not the first": ("< Plan::kKeys - rows) s[i]", ">= rows) s[i]"),
}


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The emulator's object files."""
    folder = tmp_path_factory.mktemp("emulator")
    objects = [folder / f"{name.stem}.o" for name in SOURCES]
    for name, target in zip(SOURCES, objects):
        status, said = run("c++", *FLAGS, *INCLUDE, "-x", "c++", "-c", name, "-o", target)
        assert status == 0, said
    return objects


def run_kernel(folder, emulator, replace=None):
    """Exit status and output of hopper_kernel.cpp, with the first such line of the kernel's headers replaced."""
    texts = {name: (ROOT / "csrc" / name).read_text() for name in KERNEL}
    if replace is not None:
        changed = next(name for name, text in texts.items() if replace[0] in text)
        texts[changed] = texts[changed].replace(replace[0], replace[1], 1)
    for name, text in texts.items():
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    source, program = ROOT / "tests" / "build" / "hopper_kernel.cpp", folder / "kernel"
    status, said = run("c++", *FLAGS, "-I", folder, *INCLUDE, source, *emulator, "-o", program)
    assert status == 0, said
    return run(program)


def test_emulated_in_every_order(tmp_path, emulator):
    assert run_kernel(tmp_path, emulator) == (0, "")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows_under_the_emulator(tmp_path, emulator, mistake):
    status, said = run_kernel(tmp_path, emulator, MISTAKES[mistake])
    assert status in (1, 2), said
