"""Without a GPU, kernels run under Triton's interpreter and the CUDA emulator: decided before they are imported.

One thread per worker, and per process that a test starts: two workers with two threads each on two cores spin against
one another and take several times as long. Tests of threads set their own number.
"""

import os
import shutil
import tempfile

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("VDCORE_CUDA_EMULATE", "1")

pytest_plugins = ["compile_tier"]

LONGEST = 15.0  # seconds of processor time of a test that has no marker, on CI
TIERS = {"slow", "compile", "large", "gpu"}
over_budget: list[str] = []


def is_controller(config):
    return not hasattr(config, "workerinput")


def pytest_configure(config):
    # float64 results of the reference, shared by all workers and by the processes that tests start
    if is_controller(config) and "VDCORE_TESTING_CACHE" not in os.environ:
        config.testing_cache = os.environ["VDCORE_TESTING_CACHE"] = tempfile.mkdtemp(prefix="vdcore-tests-")


def pytest_unconfigure(config):
    if hasattr(config, "testing_cache"):
        shutil.rmtree(config.testing_cache)
        del os.environ["VDCORE_TESTING_CACHE"]


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("large") and not os.environ.get("VDCORE_TEST_LARGE"):
            item.add_marker(pytest.mark.skip(reason="needs many gigabytes of memory: set VDCORE_TEST_LARGE=1"))


def processor_seconds():
    return sum(os.times()[:4])  # this process and those that it has waited for


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = processor_seconds()
    result = yield
    # Not by the clock: another process on the machine is no reason to fail.
    if not TIERS & {mark.name for mark in item.iter_markers()}:
        item.user_properties.append(("seconds", processor_seconds() - before))
    return result


def pytest_runtest_logreport(report):
    seconds = dict(report.user_properties).get("seconds", 0.0)
    if report.when == "call" and seconds > LONGEST:
        over_budget.append(f"{report.nodeid}: {seconds:.0f} s")


def pytest_terminal_summary(terminalreporter):
    if over_budget:
        terminalreporter.section(
            f"Over {LONGEST:.0f} s of processor time without a marker ({', '.join(sorted(TIERS))})"
        )
        terminalreporter.write_line("\n".join(over_budget))


def pytest_sessionfinish(session, exitstatus):
    if over_budget and os.environ.get("CI") and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def reproducible():
    """The same random stream for every test, and one thread, whatever the test before it left."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
