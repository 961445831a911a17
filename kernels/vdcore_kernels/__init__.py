"""Triton kernels, one file per operator family. Installed as ``vdcore.kernels``; the public door is ``vdcore``."""

if __name__ != "vdcore.kernels":
    raise ImportError("this folder is the package vdcore.kernels: run `pip install -e .` and import it by that name")
