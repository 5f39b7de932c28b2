"""What the fused layers of :mod:`mambify.engine.fused` share: what a read knows, and the products they are made of.

Letters: S slots, T tokens read at once, M = S·T rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

from torch import Tensor, finfo, nn

from mambify.engine.on_cpu import ReadPlans
from mambify.mixers import MixerContext, ReplayState
from mambify.mixers.attention import SlotKV
from mambify.mixers.linear import PaddedLinear
from mambify.model import HybridBlock
from mambify.norm import RMSNorm
from mambify.ops.conv_replay import conv_replay
from mambify.ops.decode_linear import Convolution, Packed, convolves, decode_linear, decode_packed, pack
from mambify.ops.ring import RingPlace

#: puts hooks for hidden states into a model that was once asked for them
_LOOKING = "transformers.utils.output_capturing"
MOST_FUSED = 8  # rows up to which Mamba1 layers have kernels of their own

State = SlotKV | ReplayState


class Reading(NamedTuple):
    """What all layers share of one read.

    Attributes:
        shape: S and T.
        place: where recurrent layers stand in their rings.
        contexts: for mixers that run as they are, attention's and the others'.
        plans: on a CPU, what the host found out for all layers.
    """

    shape: tuple[int, int]
    place: RingPlace
    contexts: tuple[MixerContext, MixerContext]
    plans: ReadPlans | None


#: adds what a mixer makes of the stream [M, D] to it, in place where that spares a kernel
Mix = Callable[[Tensor, Reading], Tensor]


class Product:
    """Linear modules of one input; see :func:`mambify.ops.decode_linear.decode_linear`.

    Args:
        packs: weights are laid out for a CPU first, each set when it is first read.
    """

    def __init__(self, backend: str, overlap: bool, *, packs: bool) -> None:
        self.backend, self.overlap, self.packs = backend, overlap, packs
        self._packed: dict[nn.Linear, Packed] = {}  # by the first of those that are read together

    def forget(self) -> None:
        """Weights have changed: what was laid out is made anew."""
        self._packed.clear()

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
        eps = 0.0 if norm is None else norm.eps or finfo(x_MD.dtype).eps
        if self.packs:
            packed = self._packed.get(linears[0])
            if packed is None:
                packed = pack([linear.weight for linear in linears], [linear.bias for linear in linears])
                self._packed[linears[0]] = packed
            norm_D = None if norm is None else norm.weight
            assert convolution is None
            return decode_packed(x_MD, packed, norm_D=norm_D, eps=eps, gated=gated, add_to_MO=add_to)
        return decode_linear(
            x_MD,
            [linear.weight for linear in linears],
            [linear.bias for linear in linears],
            norm_D=None if norm is None else norm.weight,
            eps=eps,
            gated=gated,
            add_to_MO=add_to,
            convolution=convolution,
            overlap=self.overlap,
            backend="reference" if self.backend == "reference" else "auto",
        )

    def convolved(
        self, x_MD: Tensor, linear: nn.Linear, convolution: Convolution, *, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """All outputs of one module, ``[M, O]``, and what its convolution makes of some of them, ``[M, C]``.

        It is part of the product's kernel where that has a place for it; the channels among all outputs are then
        convolved as well.
        """
        first, within = convolution.first, not self.packs and convolves(len(x_MD), linear.weight)
        y_MO = self(x_MD, [linear], norm=norm, convolution=convolution if within else None)
        part_MC = y_MO[:, first : first + len(convolution.weight_CK)]
        if within:
            return y_MO, part_MC
        new_STC = part_MC.unflatten(0, (len(convolution.ring_SRC), -1))
        x_STC = conv_replay(new_STC, *convolution[1:], overlap=self.overlap, backend=self.backend)
        return y_MO, x_STC.flatten(0, 1)


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


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody's hook has a say in what a module does; transformers' own, which only look, have none.

    accelerate's are no hooks of PyTorch's: they take the place of ``forward``.
    """
    if hasattr(module, "_hf_hook"):
        return True
    hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != _LOOKING for hook in hooks)


def is_plain(*modules: nn.Module) -> bool:
    """Whether each of these projections is its weight and its bias and nothing else, such as an adapter."""
    return all(type(module) in (nn.Linear, PaddedLinear) for module in modules)
