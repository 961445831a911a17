"""Workloads, peers, runner and report. Installed as ``vdcore.bench``; run it as ``vdcore bench``."""

if __name__ != "vdcore.bench":
    raise ImportError("this folder is the package vdcore.bench: run `pip install -e .` and import it by that name")
