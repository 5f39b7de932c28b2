"""Which of the Triton kernels multiplies: three, for what is large or small and for few rows or more.

Letters: M rows, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mambify.ops.decode_linear import triton_dots, triton_rows, triton_shared
from mambify.ops.decode_linear.convolution import Convolution

_MULTIPROCESSORS = 132  # of an H100
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Way = Literal["rows", "shared", "tiles"]


def supports(
    x_MD: Tensor, weights: Sequence[Tensor], add_to_MO: Tensor | None, convolution: Convolution | None = None
) -> bool:
    """Whether a kernel takes these: up to 8 rows, 16 of half precision, contiguous weights of one dtype, no float64."""
    sides = [x_MD, *([] if add_to_MO is None else [add_to_MO])]
    return (
        len(x_MD) <= (triton_rows.MOST_ROWS if weights[0].dtype == torch.float32 else triton_dots.MOST_ROWS)
        and {weight.dtype for weight in weights} == {weights[0].dtype}
        and all(v.dtype in _DTYPES for v in (*sides, weights[0]))
        and all(weight.is_contiguous() for weight in weights)
        and all(v.stride(1) == 1 for v in sides)
        and (convolution is None or _suits(convolution, weights[0].dtype))
    )


def _suits(convolution: Convolution, dtype: torch.dtype) -> bool:
    return 1 <= convolution.weight_CK.shape[1] <= 8 and convolution.ring_SRC.dtype == dtype


def way_of(rows: int, weights: Sequence[Tensor], *, gated: bool = False) -> Way:
    """Which kernel multiplies.

    In float32 "rows" (:mod:`mambify.ops.decode_linear.triton_rows`). In half precision "shared" for small weights
    (:mod:`mambify.ops.decode_linear.triton_shared`), of whatever number of rows, so that a row's result is the same
    alone and among others. "tiles" (:mod:`mambify.ops.decode_linear.triton_dots`) for those of many outputs from three
    rows on: a program of that kernel is one warp with a chain of products along all inputs, and weights of few outputs
    make few such programs. What has few outputs and many inputs goes there from nine rows on. Else "rows".
    """
    if weights[0].dtype == torch.float32:
        return "rows"
    heights = map(len, weights[:1] if gated else weights)
    many = triton_dots.num_programs(heights) >= _MULTIPROCESSORS
    if not many and weights[0].shape[1] <= triton_shared.MOST_INPUTS:
        return "shared"
    return "tiles" if rows >= (triton_dots.FEWEST_ROWS if many else triton_rows.MOST_ROWS + 1) else "rows"


def decode_linear(
    x_MD: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_D: Tensor | None,
    eps: float,
    gated: bool,
    add_to_MO: Tensor | None,
    convolution: Convolution | None,
    overlap: bool,
) -> Tensor:
    """See :func:`mambify.ops.decode_linear.decode_linear`; a convolution only where the kernel has one."""
    given = (x_MD, weights, biases, norm_D, eps, gated, add_to_MO)
    way = way_of(len(x_MD), weights, gated=gated)
    if way == "tiles":
        assert convolution is None
        return triton_dots.decode_linear(*given, overlap)
    if way == "shared":
        return triton_shared.decode_linear(*given, convolution, overlap)
    return triton_rows.decode_linear(*given, convolution, overlap)
