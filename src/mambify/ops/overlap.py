"""Kernels that start while the one before them ends (programmatic dependent launch, compute capability 9.0 on).

Such a kernel says at once that the next one may start, and then waits for the one before it. Before the wait it may
only read what nothing writes while models run, weights above all: several kernels of a row may have started. After it
everything before has ended and is to be seen. So a row of such kernels does what it does without, and the launch of
each is over when its turn comes.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def launch_options(overlap: bool) -> dict[str, Any]:
    """What a launch of a kernel that calls :func:`wait_for_others` is given."""
    return {"OVERLAP": overlap, **({"launch_pdl": True} if overlap else {})}


@triton.jit
def wait_for_others(OVERLAP: tl.constexpr):
    """To be called once by every program, before it reads what others have written and before it writes."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
