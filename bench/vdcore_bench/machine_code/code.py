"""Machine code as counts, and the model that makes an estimate of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Chip:
    """Of a multiprocessor: bytes of shared memory for all programs, warps and programs at most.

    Args:
        most: bytes of shared memory that one program can ask for.
    """

    shared: int
    warps: int
    programs: int
    most: int


# By how names begin, the first that fits; from CUDA's cuda_occupancy.h and its table of compute capabilities.
_LARGE, _SMALL = Chip(233_472, 64, 32, 232_448), Chip(102_400, 48, 24, 101_376)
CHIPS = {"sm_80": Chip(167_936, 64, 32, 166_912), "sm_86": Chip(102_400, 48, 16, 101_376), "sm_89": _SMALL}
CHIPS |= {"sm_87": Chip(167_936, 48, 16, 166_912), "sm_101": Chip(233_472, 48, 24, 232_448)}
CHIPS |= {"sm_9": _LARGE, "sm_10": _LARGE, "sm_12": _SMALL}
REGISTERS = 65_536  # of a multiprocessor; a warp takes them in steps of 256
RESERVED = 1024  # bytes of shared memory of each program

# Of the model: an H200.
PROCESSORS, BYTES_A_US, PEAK_A_US = 132, 32.6e3, 800e6 / 132
TRIP, BARRIER, BEGIN = 0.8, 0.04, 0.6  # us
SLOTS_A_US = 4 * 1.75e3 * 0.7
COPY = 0.92  # of the bandwidth: what a copy of this kind reaches


def known(arch: str) -> bool:
    """Whether it is one of :data:`CHIPS`."""
    return re.fullmatch(r"sm_(8[0679]|90|10[013]|12[01])", arch) is not None


def chip_of(arch: str) -> Chip:
    return next(chip for prefix, chip in CHIPS.items() if arch.startswith(prefix))


@dataclass(frozen=True)
class Code:
    """What one kernel's instructions say.

    Args:
        order: loads from memory L, asynchronous ones A, barriers B, matrix instructions M, in their order.
        sizes: bytes a thread of each of the loads.
        loops: of the innermost loops that multiply, in their order: instructions, and those of them on matrices.
    """

    order: str
    sizes: tuple[int, ...]
    instructions: int
    loops: tuple[tuple[int, int], ...] = ()

    @property
    def first(self) -> tuple[int, ...]:
        """Sizes of the loads before the first barrier, asynchronous ones aside."""
        letters = re.sub(r"[^LA]", "", self.order.partition("B")[0])
        return tuple(size for letter, size in zip(letters, self.sizes) if letter == "L")

    @property
    def copies(self) -> tuple[int, ...]:
        """Sizes of the asynchronous ones."""
        letters = re.sub(r"[^LA]", "", self.order)
        return tuple(size for letter, size in zip(letters, self.sizes) if letter == "A")

    def trips(self, most: float) -> int:
        """Loads that wait for one another: groups with a barrier between them, or a product of what was loaded.

        ``most``: bytes that a thread has to load. What is loaded behind them has been loaded before: a cache has it.
        """
        trips, loaded, sizes = 0, 0, iter(self.sizes)
        for group in re.findall(r"[LA]+", self.order):
            if loaded < most:
                trips, loaded = trips + 1, loaded + sum(next(sizes) for _ in group)
        return trips


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_MATRIX = ("HMMA", "HGMMA", "IMMA", "QMMA", "QGMMA", "OMMA", "UTCHMMA", "UTCQMMA")
_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")


def _width(opcode: str) -> int:
    """Bytes a thread of a load: LDG.E.128, LDG.E.U16, LDG.E."""
    for part in opcode.split(".")[::-1]:
        if match := re.fullmatch(r"[US]?(8|16|32|64|128|256)", part):
            return int(match.group(1)) // 8
    return 4


def code_of(sass: str) -> Code:
    """Of the text that nvdisasm or cuobjdump prints of one kernel, without what only a rare branch reaches."""
    sass = usual(sass)
    opcodes = _INSTRUCTION.findall(sass)
    order, sizes = "", []
    for opcode in opcodes:
        name = opcode.partition(".")[0]
        if name == "LDG":
            sizes.append(_width(opcode))
            order += "L"
        elif name in _COPIES:
            sizes.append(_width(opcode) if name == "LDGSTS" else 16)
            order += "A"
        elif name == "BAR" and opcode.startswith("BAR.SYNC"):
            order += "B"
        elif name in _MATRIX:
            order += "M"
    return Code(order, tuple(sizes), len(opcodes), _loops(sass))


RARE = "PMTRIG"  # what a kernel's `rare()` is: it marks a branch that few calls ever take


def usual(sass: str) -> str:
    """The lines of a kernel that can be reached without a rare branch: all of them where none is marked."""
    if RARE not in sass:
        return sass
    lines = [line for line in sass.splitlines() if _PLACE.search(line)]
    code = [place for line in lines for place in _PLACE.findall(line)]
    index = {int(at, 16): i for i, (at, _, _) in enumerate(code)}
    jumps: dict[int, int] = {}  # where lines may go on, beside the next one
    for i, (_, name, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith(("BRA", "CALL")) else None
        if target and int(target.group(1), 16) in index:
            jumps[i] = index[int(target.group(1), 16)]
    begins = {0, *jumps.values(), *(i + 1 for i, (_, name, _) in enumerate(code) if name.startswith(_ENDS))}
    marked, block = set(), 0
    for i, (_, name, _) in enumerate(code):
        block = i if i in begins else block
        if name.startswith(RARE):
            marked.add(block)
    reached: set[int] = set()
    left = [0]
    while left:
        i = left.pop()
        if i in reached or i in marked or i == len(code):
            continue
        reached.add(i)
        if i in jumps:
            left.append(jumps[i])
        if not code[i][1].startswith(_ENDS) or _CONDITION.search(lines[i]):
            left.append(i + 1)
    return "\n".join(lines[i] for i in sorted(reached))


_ENDS = ("BRA", "EXIT", "RET")  # of a block
_CONDITION = re.compile(r"\*/\s+@|BRA(\.\w+)* !?U?P\d|BRA\.(DIV|CONV)")
_PLACE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def _loops(sass: str) -> tuple[tuple[int, int], ...]:
    code = [(int(at, 16), name.partition(".")[0], rest) for at, name, rest in _PLACE.findall(sass)]
    found = []
    for end, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name == "BRA" and target and int(target.group(1), 16) <= end:
            begin = int(target.group(1), 16)
            body = [name for at, name, _ in code if begin <= at <= end]
            if products := sum(name in _MATRIX for name in body):
                found.append((begin, end, len(body), products))
    # A loop has several ways back to its beginning: the last one is its end.
    whole = {begin: max(x for x in found if x[0] == begin) for begin, *_ in found}.values()
    inner = [x for x in whole if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in whole)]
    return tuple((n, products) for _, _, n, products in sorted(inner))


def ctas_per_sm(arch: str, regs: int, warps: int, shared: int) -> int:
    """Programs of a multiprocessor at a time."""
    chip = chip_of(arch)
    a_warp = max(-(-regs // 8) * 8, 24) * 32
    return min(REGISTERS // (a_warp * warps), chip.shared // (shared + RESERVED), chip.programs, chip.warps // warps)


def estimate(row: Mapping[str, Any], *, flops: bool = False) -> tuple[float, str]:
    """The model's share of a row of raw fields, and what the kernel is bound by.

    ``flops``: its products are held to the peak too; without them it is bytes, latency and issue slots alone.
    """
    programs, ctas = row["programs"], row["ctas_per_sm"]
    if not ctas:
        return 0.0, "shared memory"
    times = {
        "bandwidth": row["bytes"] / programs / BYTES_A_US,
        "latency": (row["trips"] * TRIP + row["barriers"] * BARRIER + BEGIN) / ctas,
        "issue": row["instructions"] * row["warps"] / SLOTS_A_US,
    }
    if flops and row["mma"] and row["flops"]:
        times["compute"] = row["flops"] / programs / PEAK_A_US
    slowest = max(times, key=lambda name: times[name])
    waves = programs / (PROCESSORS * ctas)
    full = (waves / -(-waves // 1) + 1) / 2 if waves < 6 else 1.0
    needed = max(times["bandwidth"], times.get("compute", 0.0))
    return round(COPY * needed / times[slowest] * full, 3), slowest


def derived(row: Row) -> Row:
    """The row with what the model makes of its raw fields."""
    share, bound = estimate(row)
    held, held_by = estimate(row, flops=True)
    row = row | {"estimate": share, "bound_by": bound, "flops_estimate": held, "flops_bound_by": held_by}
    return row | {"pair_ps": pair_time(row)} if "pairs" in row else row


def pair_time(row: Mapping[str, Any]) -> float:
    """Of a row of tiles: picoseconds of the whole chip for a visible pair of one head, as products at their peak or as
    instructions, tile after tile."""
    product = row["tile_flops"] / PEAK_A_US
    issue = {kind: row[f"{kind}_instructions"] * row["warps"] / SLOTS_A_US for kind in ("whole", "tested")}
    us = sum(row[f"{kind}_tiles"] * max(product, issue[kind]) for kind in issue)
    return round(us / PROCESSORS / row["pairs"] * 1e6, 4)


def by_pairs(row: Row, code: Code, walk: Any, job: Any) -> Row:
    """The row of a job's kernel that walks through tiles, with the time of a visible pair; walk: sparse.Walk."""
    pairs = round(job.forward_flops() / (4 * job.shape.D))  # of all heads
    loops = code.loops
    if len(loops) < 1 + (walk.tested > 0):
        raise ValueError(f"{row['kernel']} on {row['arch']}: {len(loops)} loops of products were found in its code")
    a_tile = min(products for _, products in loops)  # a compiler may unroll
    of_a_tile = [round(n * a_tile / products) for n, products in loops]
    row = row | {"pairs": pairs, "tile_flops": walk.flops, "whole_tiles": walk.whole, "tested_tiles": walk.tested}
    return derived(
        row | {"whole_instructions": of_a_tile[0], "tested_instructions": of_a_tile[1] if walk.tested else 0}
    )


def filled(row: Row, code: Code, *, regs: int, spills: int, shared: int, warps: int) -> Row:
    """The row, which says arch, programs, bytes and flops, with what is counted in its code, and the estimate."""
    ctas = ctas_per_sm(row["arch"], regs, warps, shared)
    width = Counter(code.first).most_common(1)[0][0] if code.first else 0
    row = row | {
        "regs": regs,
        "spills": spills,
        "shared": shared,
        "ctas_per_sm": ctas,
        "warps": warps,
        "loads_before_barrier": len(code.first),
        "load_bytes": width,
        "bytes_in_flight": ctas * warps * 32 * len(code.first) * width,
        "barriers": code.order.count("B"),
        "async_copy_bytes": min(code.copies, default=0),
        "mma": code.order.count("M"),
        "trips": code.trips(row["bytes"] / row["programs"] / (32 * warps)),
        "instructions": code.instructions,
    }
    return derived(row)


def failed(row: Row, warps: int, reason: str) -> Row:
    """A row of a kernel that no compiler took."""
    found = filled(row, code_of(""), regs=0, spills=0, shared=0, warps=warps)
    bound = f"it fails: {reason}"
    return found | {"estimate": 0, "bound_by": bound, "flops_estimate": 0, "flops_bound_by": bound}
