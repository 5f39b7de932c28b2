"""The short depthwise convolution over a few new tokens that may yet be rejected: its last inputs are kept in a ring.

Letters: S rows (slots), T new tokens, C channels, K width, L = K − 1 inputs before the first new one, R places of a
ring, E rows of a selection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.errors import InvalidOptionError
from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.causal_conv import Activation
from mambify.ops.conv_replay import reference
from mambify.ops.ring import RingPlace

if HAS_TRITON:
    from mambify.ops.conv_replay import triton as kernels

__all__ = ["conv_replay", "load_window", "read_window"]


def conv_replay(
    x_STC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    ring_SRC: Tensor,
    place: RingPlace,
    *,
    activation: Activation = "silu",
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Convolves T new tokens of each row after the inputs that were accepted before them.

        y_t = act( bias + Σ_k weight_k x_{t−(K−1)+k} )

    The inputs before the first new one are the K − 1 places before ``place.head_S``; the new inputs are written from
    there on, and become the window of the next round as far as they are accepted: nothing is copied back. The outputs
    are those of T calls of :func:`mambify.ops.causal_conv.causal_conv_step`. In rows that are not active the ring does
    not change, and y is zero.

    Args:
        x_STC: inputs. Sets the dtype of ``y``; sums are kept in float32.
        weight_CK, bias_C: as in :func:`mambify.ops.causal_conv.causal_conv`.
        ring_SRC: inputs of recent tokens, changed in place; begun by :func:`load_window`.
        place: where each row stands; only read. Has T + K − 1 places at least.
        activation: "silu" or None.
        overlap: the kernel starts while the one before it ends (:mod:`mambify.ops.overlap`).
        backend: "auto", "reference" or "triton" (one dtype for x and the ring, no float64).

    Returns:
        y_STC in x's dtype.

    Raises:
        InvalidOptionError: unknown backend or activation.
        ValueError: shapes that do not belong together, or more new tokens than the ring is for.
    """
    supported = HAS_TRITON and kernels.supports(x_STC, weight_CK, bias_C, ring_SRC)
    chosen = pick_backend("conv_replay", backend, backends_on(x_STC.device, supported=supported))
    if activation not in ("silu", None):
        raise InvalidOptionError(f"conv_replay: no activation '{activation}'; known: 'silu', None")
    slots, new, channels = x_STC.shape
    width = weight_CK.shape[1]
    place.check("conv_replay", slots, new)
    if new + width - 1 > place.capacity:
        raise ValueError(f"conv_replay: {new} new tokens and a width of {width} need {new + width - 1} places")
    check_shape("conv_replay", "weight_CK", weight_CK, (channels, width))
    check_shape("conv_replay", "bias_C", bias_C, (channels,))
    check_shape("conv_replay", "ring_SRC", ring_SRC, (slots, place.capacity, channels))
    given = (x_STC, weight_CK, bias_C, ring_SRC, place, activation == "silu")
    return reference.conv_replay(*given) if chosen == "reference" else kernels.conv_replay(*given, overlap)


def load_window(ring_SRC: Tensor, place: RingPlace, row_E: Tensor, state_ECL: Tensor) -> None:
    """Puts the last inputs of a prompt, as :func:`mambify.ops.causal_conv.causal_conv` returns them, before the heads
    of rows ``row_E``."""
    at_EL = (place.head_S[row_E, None] - state_ECL.shape[2] + _steps(state_ECL)).remainder(place.capacity)
    ring_SRC[row_E[:, None], at_EL] = state_ECL.mT.to(ring_SRC.dtype)


def read_window(ring_SRC: Tensor, place: RingPlace, width: int) -> Tensor:
    """The last K − 1 accepted inputs of every row, oldest first, ``[S, C, K−1]``: the convolution's usual state."""
    row_S1 = torch.arange(len(ring_SRC), device=ring_SRC.device)[:, None]
    steps_L = torch.arange(width - 1, device=ring_SRC.device)
    return ring_SRC[row_S1, (place.head_S[:, None] - (width - 1) + steps_L).remainder(place.capacity)].mT


def _steps(state_ECL: Tensor) -> Tensor:
    return torch.arange(state_ECL.shape[2], device=state_ECL.device)
