"""Benchmarks: what something takes on this machine, beside what the machine could do at best."""

from __future__ import annotations

from mambify.bench.registry import BENCHMARKS, run_benchmark

__all__ = ["BENCHMARKS", "run_benchmark"]
