"""Linear layers of a few tokens by PyTorch's own products: on a GPU also what many rows are multiplied with.

Letters: M rows, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.ops.swiglu import swiglu

_MULTIPLE = 8  # 16 bytes of bfloat16: how far apart rows must be for tensor cores' fast stores


def decode_linear(
    x_MD: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_D: Tensor | None,
    eps: float,
    gated: bool,
    add_to_MO: Tensor | None,
) -> Tensor:
    """See :func:`mambify.ops.decode_linear.decode_linear`."""
    x_MD = x_MD.to(weights[0].dtype)
    if norm_D is not None:
        x_MD = F.rms_norm(x_MD, x_MD.shape[1:], norm_D.to(x_MD.dtype), eps)
    if not gated and add_to_MO is not None and len(weights) == 1 and add_to_MO.dtype == x_MD.dtype:
        if biases[0] is not None:
            add_to_MO += biases[0]
        return add_to_MO.addmm_(x_MD, weights[0].T)  # the sum is part of the product's kernel
    if gated:
        y_MO = swiglu(F.linear(x_MD, weights[0], biases[0]), F.linear(x_MD, weights[1], biases[1]))
    elif len(weights) == 1 and len(weights[0]) % _MULTIPLE == 0:
        y_MO = F.linear(x_MD, weights[0], biases[0])
    else:
        y_MO = _side_by_side(x_MD, weights, biases)
    return y_MO if add_to_MO is None else add_to_MO.add_(y_MO)


def _side_by_side(x_MD: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """The outputs of all weights in one buffer, each written to its place."""
    outputs = sum(map(len, weights))
    y_MO = x_MD.new_empty(len(x_MD), outputs + -outputs % _MULTIPLE)[:, :outputs]
    for part_MO, weight, bias in zip(y_MO.split([*map(len, weights)], dim=1), weights, biases, strict=True):
        if bias is None:
            torch.mm(x_MD, weight.T, out=part_MO)
        else:
            torch.addmm(bias, x_MD, weight.T, out=part_MO)
    return y_MO
