"""How kernels of linear layers end: what becomes of sums over inputs, and where it goes.

Letters: M rows, O outputs; sums are ``[outputs, rows]`` of a program, o and m their places.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def biased_and_gated(y, up_y, b_ptr, up_b_ptr, o, O: tl.constexpr, GATED: tl.constexpr):
    """Sums with their biases, where there are any, and of a gated pair SiLU(y) · up_y."""
    if b_ptr is not None:
        y += tl.load(b_ptr + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    if up_b_ptr is not None:
        up_y += tl.load(up_b_ptr + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    if GATED:
        y = y * tl.sigmoid(y) * up_y
    return y


@triton.jit
def written_to(y_ptr, y, o, m, y_row, M: tl.constexpr, O: tl.constexpr, ADD: tl.constexpr):
    """Written to rows that lie ``y_row`` apart, or added to what is there."""
    target = y_ptr + m[None, :] * y_row + o[:, None]
    inside = (m < M)[None, :] & (o < O)[:, None]
    if ADD:
        y += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=inside)
