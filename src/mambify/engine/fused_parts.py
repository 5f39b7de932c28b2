"""What the fused layers of :mod:`mambify.engine.fused` share: what a read knows, and the products they are made of.

Letters: S slots, T tokens read at once, M = S·T rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, finfo, nn

from mambify.mixers import MixerContext, ReplayState
from mambify.mixers.attention import SlotKV
from mambify.mixers.linear import PaddedLinear
from mambify.model import HybridBlock
from mambify.norm import RMSNorm
from mambify.ops.decode_linear import Convolution, decode_linear
from mambify.ops.ring import RingPlace

MOST_FUSED = 8  # rows up to which a product and what stands around it are one kernel

State = SlotKV | ReplayState


class Reading(NamedTuple):
    """What all layers share of one read.

    Attributes:
        shape: S and T.
        place: where recurrent layers stand in their rings.
        ends_S: tokens in each slot with the new ones.
        contexts: for mixers that run as they are, attention's and the others'.
    """

    shape: tuple[int, int]
    place: RingPlace
    ends_S: Tensor
    contexts: tuple[MixerContext, MixerContext]


#: adds what a mixer makes of the stream [M, D] to it, in place where that spares a kernel
Mix = Callable[[Tensor, Reading], Tensor]


class Product:
    """Linear modules of one input; see :func:`mambify.ops.decode_linear.decode_linear`."""

    def __init__(self, backend: str, overlap: bool) -> None:
        self.backend, self._overlap = backend, overlap

    def __call__(
        self,
        x_MD: Tensor,
        linears: Sequence[nn.Linear],
        *,
        norm: RMSNorm | None = None,
        gated: bool = False,
        add_to: Tensor | None = None,
        convolution: Convolution | None = None,
    ) -> Tensor:
        return decode_linear(
            x_MD,
            [linear.weight for linear in linears],
            [linear.bias for linear in linears],
            norm_D=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.eps or finfo(x_MD.dtype).eps,
            gated=gated,
            add_to_MO=add_to,
            convolution=convolution,
            overlap=self._overlap,
            backend="reference" if self.backend == "reference" else "auto",
        )


class Unfused:
    """A mixer as it is."""

    def __init__(self, block: HybridBlock, state: State) -> None:
        self._block, self._state = block, state

    def __call__(self, x_MD: Tensor, reading: Reading) -> Tensor:
        state, (with_positions, without) = self._state, reading.contexts
        context = with_positions
        if isinstance(state, ReplayState):
            state, context = state._replace(place=reading.place), without
        normed_STD = self._block.input_layernorm(x_MD).unflatten(0, reading.shape)
        y_STD: Tensor = self._block.mixer(normed_STD, context, state)[0]
        return x_MD + y_STD.flatten(0, 1)


def is_plain(*modules: nn.Module) -> bool:
    """Whether each of these projections is its weight and its bias and nothing else, such as an adapter."""
    return all(type(module) in (nn.Linear, PaddedLinear) for module in modules)
