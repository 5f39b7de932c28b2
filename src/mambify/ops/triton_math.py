"""Functions that kernels of several operations call."""
# mypy: allow-untyped-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(v):
    """log(1 + e^v), to 4e-6 of itself: a series for small e^v, where 1 + e^v would round."""
    u = tl.exp(tl.minimum(v, 20.0))
    series = u * (1.0 - u * (0.5 - u * (1.0 / 3.0 - u * 0.25)))
    return tl.where(v > 20.0, v, tl.where(u < 0.03125, series, tl.log2(1.0 + u) * 0.6931471805599453))
