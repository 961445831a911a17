"""Random calls: any operator, alternatives of its arguments, sizes, strides, dtype and values, against float64.

``VDCORE_CPU_ISA=avx2 pytest -m slow tests/test_random_calls.py`` spends 20 minutes on that instruction set.
"""

import time
from dataclasses import fields

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from support import FAST, backends_of
from test_pairs import check_choice

from vdcore import FrameMask
from vdcore.testing.alternatives import SPACES, Sizes
from vdcore.testing.run import forget

SIZES = {
    "B": st.integers(1, 3),
    "T": st.one_of(st.integers(1, 9), st.integers(10, 70)),
    "S": st.one_of(st.integers(1, 9), st.sampled_from((16, 33, 70))),
    "H": st.sampled_from((2, 4, 6)),
    "D": st.one_of(st.sampled_from((8, 16, 40, 64, 72)), st.integers(4, 130)),
    "L": st.one_of(st.integers(1, 9), st.sampled_from((17, 40, 77))),
}
# Of interpreted calls, a program of which, per frame and head, takes a second, and a call of 1,000 scores ten.
FEW = {
    "B": st.integers(1, 2),
    "T": st.integers(2, 3),
    "S": st.integers(2, 5),
    "H": st.just(2),
    "D": SIZES["D"],
    "L": st.integers(2, 9),
}
MOST = 40_000  # scores of a call: the reference in float64 holds them all
MOST_INTERPRETED = 600


@st.composite
def calls(draw, backends):
    backend = draw(st.sampled_from(backends))
    op = draw(st.sampled_from([op for op in SPACES if backend in backends_of(op)]))
    space = SPACES[op]
    few = backend not in FAST
    alternatives = dict(space.alternatives)
    if few or backend == "sdpa":
        # Gradients of scores of rows that see one key are 0, and so are the naive form's. Torch's are not, nor those of
        # the GPU's kernels, whose row sums are rounded once more: up to 1.5 of what the rule allows.
        alternatives["mask"] = [x for x in alternatives.get("mask", ()) if x != FrameMask.same_frame()]
        alternatives["lengths"] = [x for x in alternatives.get("lengths", ()) if x is None]
    choice = {name: draw(st.sampled_from(values)) for name, values in alternatives.items() if values}
    hypothesis.assume(space.allows(choice))
    sizes = Sizes(**{field.name: draw((FEW if few else SIZES)[field.name]) for field in fields(Sizes)})
    B, T, S, H, D, L = (getattr(sizes, name) for name in "BTSHDL")
    rows = T * S if op == "video_attention" else max(T, S)
    values = B * T * S * L * max(D, 200) if "patchify" in op else B * T * S * H * D
    hypothesis.assume(rows * rows * H * B <= (MOST_INTERPRETED if few else MOST) and values <= 4 * MOST)
    if backend == "sdpa":
        hypothesis.assume(min(T, S) > 1)
    if op == "tile_attention":  # of one token the form's gradient of v is exact, the engine's has the rounding of lse
        hypothesis.assume(T * S > 1)
    return op, choice, sizes, backend


def try_random_calls(seconds, backends, monkeypatch):
    """Batches of new calls until the time is over; a call that fails is shrunk and shown."""
    monkeypatch.delenv("VDCORE_TESTING_CACHE", raising=False)  # nothing is tried twice
    tried, until, batch, failed = 0, time.monotonic() + seconds, 0, False

    def one(call):
        nonlocal tried, failed
        if time.monotonic() > until and not failed:  # a batch ends with the time; what failed is still shrunk
            return
        try:
            check_choice(*call)
            tried += 1
        except pytest.skip.Exception:  # this backend does not run the call, and says so
            pass
        except Exception:
            failed = True
            raise
        finally:
            forget()

    while time.monotonic() < until:
        test = hypothesis.given(calls(backends))(lambda call: one(call))
        test = settings(
            max_examples=20,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(test)
        hypothesis.seed(batch)(test)()
        batch += 1
    assert tried > 0


def test_compiled_engine(monkeypatch):
    try_random_calls(12, ["cpu"], monkeypatch)


@pytest.mark.slow  # one call may take half of what a test without a marker has
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_interpreted(backend, monkeypatch):
    if backend not in backends_of("temporal_attention"):
        pytest.skip(f"{backend} does not run here")
    try_random_calls(5, [backend], monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_minutes(monkeypatch):
    try_random_calls(1200, ["cpu"], monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("backend", ["sdpa", "triton", "cuda"])
def test_other_backends_for_long(backend, monkeypatch):
    if backend not in backends_of("spatial_attention"):
        pytest.skip(f"{backend} does not run here")
    try_random_calls(300, [backend], monkeypatch)
