"""The emulator that stands in for a GPU: a kernel that is wrong must fail under it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parent
CSRC = TESTS.parent / "csrc"

pytestmark = pytest.mark.compile("tests/emulator/*.cpp", "tests/cuda/*.cpp", tools=["c++"])


def compile_cpp(*what: object) -> None:
    subprocess.run(["c++", "-std=c++17", "-O1", "-w", *map(str, what)], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> list[Path]:
    """Its object files."""
    folder = tmp_path_factory.mktemp("emulator")
    sources = sorted((TESTS / "emulator").glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    for source, target in zip(sources, objects):
        compile_cpp("-DVDCORE_EMULATE", "-I", CSRC, "-I", TESTS, "-c", source, "-o", target)
    return objects


def run(folder: Path, emulator: list[Path], source: Path, *include: Path, defined: str = "NOTHING") -> list[str]:
    """Lines that the program prints, run by the emulator; files in ``include`` come before those of csrc."""
    program = folder / source.stem
    paths = [f"-I{path}" for path in (*include, CSRC, TESTS)]
    compile_cpp(f"-D{defined}", *paths, source, *emulator, "-o", program)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()


def by_kernel(lines: list[str]) -> dict[str, dict[str, str]]:
    """What was said of each kernel in each order."""
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        name, order, what = line.split(" ", 2)
        found.setdefault(name, {})[order] = what
    return found


@pytest.fixture(scope="module")
def said(tmp_path_factory, emulator) -> dict[str, dict[str, str]]:
    return by_kernel(run(tmp_path_factory.mktemp("instructions"), emulator, HERE / "instructions.cpp"))


@pytest.mark.parametrize("kernel", ["shared", "warp", "agreed", "product"])
def test_right_kernels_are_right_in_every_order(said, kernel):
    assert set(said[kernel].values()) == {"right"}


def test_a_wrong_kernel_gives_wrong_results(said):
    assert "wrong" in said["product-rows-swapped"].values()


@pytest.mark.parametrize(
    "kernel,objection",
    [
        ("shared-no-barrier", "a read and a write of one address, and nothing orders them"),
        ("warp-no-barrier", "a read and a write of one address, and nothing orders them"),
        ("shared-lost-warp", "waits for ever at a barrier"),
        ("shared-beyond", "outside of every tensor"),
        ("warp-half", "waits for ever at vote"),
        ("agreed-by-halves", "do not agree"),
        ("agreed-beyond", "a shuffle with lane"),
    ],
)
def test_what_a_kernel_must_not_do(said, kernel, objection):
    assert all(objection in what for what in said[kernel].values())


UNORDERED = "a read and a write of one address, and nothing orders them"
CONSTANT = "a load by ld.global.nc of what the kernel writes"
# Rule by rule: kernels of rules.cpp and ordering.cpp that break it, their numbers right, and what the emulator says.
BROKEN = {
    "E1": {"base-before-the-tensor": "outside of every tensor"},
    "E2": {
        "result-written-in-flight": "registers of a wgmma in flight are written: its result",
        "operand-written-in-flight": "registers of a wgmma in flight are written: its first operand",
    },
    "E3": {
        "registers-written-after-the-fence": "written after the last wgmma.fence",
        "first-result-written-after-the-fence": "written after the last wgmma.fence",
        "first-operand-written-after-the-fence": "written after the last wgmma.fence",
        "another-shape-in-flight": "wgmma of another shape adds to a result in flight",
    },
    "E4": {
        "one-warp-with-another-descriptor": "the warps of a warpgroup issue different wgmma",
        "a-warp-without-its-product": "wgmma by some warps of a warpgroup only",
        "one-lane-with-another-scale": "lanes give wgmma different scale-d",
        "one-warp-at-another-place": "the warps of a warpgroup issue different wgmma",
        "a-descriptor-within-its-swizzle": "begins within its swizzle's eight rows",
    },
    "E5": {
        "more-registers-than-there-are": "waits for ever at setmaxnreg.inc",
        "no-multiple-of-8": "setmaxnreg.inc of 156",
        "two-numbers-in-a-warpgroup": "setmaxnreg of different numbers of registers by the warps of a warpgroup",
        "two-places-in-a-warpgroup": "setmaxnreg at different places by the warps of a warpgroup",
        "twice-without-a-barrier": "nothing orders it behind the last one of the warpgroup",
    },
    "E6": {
        "half-warps": "a barrier that only some lanes of a warp reach",
        "two-places": "lanes of a warp arrive at a barrier from different places",
        "two-places-of-a-product": "both at mma",
        "twice-in-a-phase": "a warp arrives twice at a barrier in one phase",
        "barrier-16": "barrier 16: there are 0 to 15",
        "forty-threads": "a barrier of 40 threads",
    },
    "E7": {
        "threads": "a launch of 1056 threads",
        "shared-memory": "a launch of 232449 bytes of shared memory",
        "parameters": "bytes of parameters, at most 4096",
    },
    "E8": {
        "no-fence-of-the-proxy": "without its fence.proxy.async",
        "no-fence-of-the-proxy-before-a-box": "without its fence.proxy.async",
        "no-fence-of-mbarriers-of-a-cluster": "initialised without a fence.mbarrier_init is used by others",
        "no-fence-of-mbarriers": "initialised without a fence.mbarrier_init is used by others",
        "mbarrier-initialised-again": "an mbarrier is initialised again",
        "mbarrier-of-nobody": "an mbarrier of 0 arrivals",
        "too-many-bytes": "an mbarrier of 1048576 bytes",
        "bytes-of-no-box": "an mbarrier was told of other bytes than have landed",
        "nobody-waits-for-a-box": "nobody has waited for a box",
        "box-on-an-mbarrier": "a box lands on an mbarrier",
    },
    "E9": {
        "two-blocks-write": "two blocks write one address",
        "two-threads-write": "two threads write one address, and nothing orders them",
        "constant-load-of-what-is-written": CONSTANT,
        "constant-load-before-the-store": CONSTANT,
        "box-before-the-store": CONSTANT,
    },
    "E10": {
        "barriers-of-others": "two threads write one address, and nothing orders them",
        "barriers-of-others-between-stores": "two threads write one address, and nothing orders them",
        "no-barrier": UNORDERED,
        "mbarrier-of-another-block": "a load of what another block writes",
        "no-barrier-of-the-cluster": "a load of what another block writes",
        "block-reads-what-another-writes-later": "a load of what another block writes",
        "block-reads-what-another-wrote": "a load of what another block writes",
        "vote-for-a-barrier": UNORDERED,
        "one-lane-waits": UNORDERED,
        "store-behind-the-arrival": UNORDERED,
        "one-lane-arrives": UNORDERED,
    },
}


@pytest.fixture(scope="module")
def ruled(tmp_path_factory, emulator) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("rules")
    return by_kernel([line for name in ("rules", "ordering") for line in run(folder, emulator, HERE / f"{name}.cpp")])


def test_kernels_that_keep_the_rules_are_right(ruled):
    right = {name: set(what.values()) for name, what in ruled.items() if name.endswith("-right")}
    assert len(right) == 17 and set.union(*right.values()) == {"right"}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_kernel_that_breaks_a_rule_is_an_error_in_every_order(ruled, rule):
    names = {name.partition("-")[2] for name in ruled if name.partition("-")[0] == rule and not name.endswith("right")}
    assert names == set(BROKEN[rule])
    for name, objection in BROKEN[rule].items():
        assert all(objection in what for what in ruled[f"{rule}-{name}"].values()), ruled[f"{rule}-{name}"]


BITS = HERE / "kernel_bits.cpp"
SHORT, LONG = "temporal_attention/backward.cuh", "temporal_attention/backward_long.cuh"
FORWARD, ALONE = "temporal_attention/forward.cuh", "qk_norm_rope/qk_norm_rope.cu"
NORM, ROWS = "qk_norm_rope/norm_rope_backward.cuh", "core/rows.cuh"

# Kernel of kernel_bits.cpp, header, what stands there, what to put in its place, how many such lines stand before.
MUTANTS = [
    (0, SHORT, "  sync_block();", "", 0),
    (0, SHORT, "w[i % 2 * 2 + i / 2]", "w[i]", 0),
    (
        0,
        ROWS,
        "transpose8x8(first.x[i].x[j]), transpose8x8(last",
        "transpose8x8(last.x[i].x[j]), transpose8x8(first",
        0,
    ),
    (1, SHORT, "  kAlone ? sync_warp() : sync_block();", "", 0),
    (1, SHORT, "  sync_block();", "", 0),
    (1, NORM, "  sync_block();", "", 0),
    (1, NORM, "2 * h + 1], j, -1);", "2 * h + 1], j);", 0),
    (1, "qk_norm_rope/norm_rope.cuh", "odd ? upper : lower", "odd ? lower : upper", 0),
    (1, NORM, "half(2, four[e], four[e + 2])", "half(2, four[e + 2], four[e])", 0),
    (2, LONG, "  sync_block();", "", 0),
    (2, LONG, "  sync_block();", "", 1),
    (3, FORWARD, "    sync_block();", "", 0),
    (4, ALONE, "  sync_warp();", "", 0),
    (4, ALONE, "  sync_warp();", "", 1),
]


@pytest.mark.parametrize("kernel", range(5))
def test_a_real_kernel_and_its_mutants(tmp_path, emulator, kernel):
    """Right: the same bits in every order of warps. Without a barrier or with terms exchanged: not these."""
    right = run(tmp_path, emulator, BITS, defined=f"KERNEL={kernel}")
    assert len(right) == 4 and len(set(right)) == 1
    for i, (_, header, before, after, skipped) in enumerate(m for m in MUTANTS if m[0] == kernel):
        parts = (CSRC / "cuda" / header).read_text().split(before)
        assert len(parts) > skipped + 1
        folder = tmp_path / str(i)
        changed = folder / "cuda" / header
        changed.parent.mkdir(parents=True)
        changed.write_text(before.join(parts[: skipped + 1]) + after + before.join(parts[skipped + 1 :]))
        # Headers beside the changed one are found by the path they are included by, under csrc.
        assert set(run(folder, emulator, BITS, folder, defined=f"KERNEL={kernel}")) != set(right), (header, before)
