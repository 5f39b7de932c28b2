"""The convolution that may follow a linear layer. Letters as in the package's ``__init__``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mambify.ops.ring import RingPlace


class Convolution(NamedTuple):
    """What :func:`mambify.ops.conv_replay.conv_replay` makes of some of the outputs, with SiLU.

    A channel is convolved with its own last inputs, so whoever has made its new ones has all that is needed.

    Attributes:
        first: output that is channel 0.
        weight_CK, bias_C: taps, oldest first, contiguous; bias or None.
        ring_SRC: inputs of recent tokens, changed in place.
        place: where each of the S slots stands in the ring; only read. Slots that are not active give zero.
    """

    first: int
    weight_CK: Tensor
    bias_C: Tensor | None
    ring_SRC: Tensor
    place: RingPlace
