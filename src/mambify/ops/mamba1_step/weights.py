"""What a step of Mamba1 is made of beside its inputs. Letters as in the package's ``__init__``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Mamba1Weights(NamedTuple):
    """What a Mamba1 mixer has around its scan.

    Attributes:
        dt_IE, dt_bias_I: the projection of Δ from its rank, before softplus.
        A_JMN, D_JM: of the scan; A = −exp(A_log).
        B_bias_GUN, C_bias_JN: added to B and C where they are given.
    """

    dt_IE: Tensor
    dt_bias_I: Tensor
    A_JMN: Tensor
    D_JM: Tensor
    B_bias_GUN: Tensor | None = None
    C_bias_JN: Tensor | None = None


class StepConv(NamedTuple):
    """The convolution of x, where it is yet to be done: its heads are repeated, then it passes the convolution and
    SiLU, as :func:`mambify.ops.conv_replay.conv_replay` has it.

    Attributes:
        weight_IK, bias_I: taps, oldest first, and bias or None.
        ring_SRI: inputs of recent tokens, changed in place.
    """

    weight_IK: Tensor
    bias_I: Tensor | None
    ring_SRI: Tensor
