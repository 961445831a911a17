"""The machine under a measurement: who else keeps it busy."""

from types import SimpleNamespace

import psutil
import pytest

from vdcore_bench.measure import machine


def test_the_load_of_others_is_neither_ours_nor_that_of_our_processes(monkeypatch):
    """In ten seconds of two processors: 4 s ours, 3 s of a child, 1 s of one that ended, 6 s of others, 2 s stolen."""
    now, times = [0.0], {"user": 100.0, "idle": 50.0, "steal": 5.0}

    def process(*seconds):
        return SimpleNamespace(cpu_times=lambda: [s * now[0] for s in (*seconds, 99.0)])

    me = process(0.3, 0.1, 0.1, 0.0)
    me.children = lambda recursive: [process(0.2, 0.1, 0.0, 0.0)]

    def cpu_times():
        grown = {"user": 1.4, "idle": 0.4, "steal": 0.2}
        seconds = {name: times[name] + grown[name] * now[0] for name in times}
        return SimpleNamespace(_asdict=lambda: seconds, **seconds)

    monkeypatch.setattr(psutil, "Process", lambda: me)
    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[0])
    load = machine.Load()
    now[0] = 10.0
    assert load.so_far() == pytest.approx((0.6, 0.2))


def test_the_load_of_this_machine():
    others, stolen = machine.Load().so_far()
    assert others >= 0 and stolen >= 0
