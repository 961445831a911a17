"""Workloads, baselines, suites and reports, behind ``vdcore bench``, ``vdcore profile`` and ``vdcore doctor``."""
