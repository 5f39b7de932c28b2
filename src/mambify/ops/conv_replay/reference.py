"""The convolution of new tokens after a ring in pure torch. Letters as in the package's ``__init__``."""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.causal_conv import reference
from mambify.ops.ring import RingPlace, write_ring


def conv_replay(
    x_STC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, ring_SRC: Tensor, place: RingPlace, silu: bool
) -> Tensor:
    """See :func:`mambify.ops.conv_replay.conv_replay`."""
    back_L = torch.arange(1 - weight_CK.shape[1], 0, device=x_STC.device)
    at_SL = (place.head_S[:, None] + back_L).remainder(place.capacity)
    row_S1 = torch.arange(len(x_STC), device=x_STC.device)[:, None]
    y_STC, _ = reference.causal_conv(x_STC, weight_CK, bias_C, silu, ring_SRC[row_S1, at_SL].mT, None)
    write_ring(ring_SRC, x_STC, place)
    return y_STC.masked_fill(~place.active_S[:, None, None], 0)
