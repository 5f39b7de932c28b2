"""What every mixer is: a module ``y, state = mixer(x, context, state)``, and how its state meets a cache.

Legend: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from mambify.config import HybridConfig


class MixerContext(NamedTuple):
    """What one forward pass knows beside the hidden states; the same for all layers of one kind.

    Attributes:
        position_embeddings: RoPE's (cos, sin), each ``[B, T, P]``.
        attention_mask: the causal mask in the form the attention backend takes.
        padding_mask_BT: 1 for tokens, 0 for padding; ``None`` when nothing is padded.
        seq_idx_BT: document number of each token of packed rows; ``None`` for one document a row.
        attention_kwargs: further arguments of the attention backend (``cu_seq_lens_q`` …).
    """

    position_embeddings: tuple[Tensor, Tensor] | None = None
    attention_mask: Tensor | None = None
    padding_mask_BT: Tensor | None = None
    seq_idx_BT: Tensor | None = None
    attention_kwargs: Mapping[str, Any] = {}


class RecurrentState(NamedTuple):
    """All that a recurrent mixer carries from one token to the next.

    Attributes:
        conv: the last K-1 inputs of the convolution, oldest first, ``[B, C, K-1]``.
        ssm: the state-space state in float32, ``[B, H, P, N]`` (Mamba2) or ``[B, J, M, N]`` (Mamba1).
    """

    conv: Tensor
    ssm: Tensor


class AttentionWeights(NamedTuple):
    """One attention layer's parameters, as a mixer is built from them. Projections as in nn.Linear.

    Attributes:
        q, k, v, o: ``[H·P, D]``, ``[G·P, D]``, ``[G·P, D]``, ``[D, H·P]``.
        q_bias, k_bias, v_bias: ``[H·P]``, ``[G·P]``, ``[G·P]`` or None.
        o_bias: ``[D]`` or None.
        q_norm, k_norm: weights ``[P]`` of Qwen3's per-head norms or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


class Mixer(nn.Module):
    """Base of the modules that mix tokens. A new one is a file here and a row in :data:`MIXERS`."""

    #: parameters that stay float32 whatever dtype the model is cast to
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    #: names of the initialisations :meth:`from_attention` knows; empty for attention itself
    initialisations: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: HybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def load_state(self, cache: Cache) -> Any:
        """The state this layer left in ``cache``, or ``None`` before its first token."""
        raise NotImplementedError

    def store_state(self, cache: Cache, state: Any) -> None:
        """Leaves ``state`` in ``cache`` for the next call."""
        raise NotImplementedError

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights, *, init: str, generator: torch.Generator) -> None:
        """Fills this mixer's parameters from the attention layer it replaces."""
        raise NotImplementedError

    def init_random(self) -> None:
        """Fills the parameters that transformers' default initialisation does not know; none by default."""

    @classmethod
    def state_bytes(cls, config: HybridConfig, num_tokens: int, element_size: int) -> int:
        """Bytes one layer carries for one sequence of ``num_tokens`` tokens."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts like any module, except that :attr:`float32_parameters` keep their precision."""
        before = {name: getattr(self, name).detach() for name in self.float32_parameters}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, original in before.items():
            parameter = getattr(self, name)
            if parameter.dtype != original.dtype and original.dtype == torch.float32:
                parameter.data = original.to(parameter.device)
        return self


class RecurrentMixer(Mixer):
    """A mixer whose state is a :class:`RecurrentState`, kept in a linear-attention cache layer."""

    def load_state(self, cache: Cache) -> RecurrentState | None:
        layer: Any = cache.layers[self.layer_idx]
        if not layer.has_previous_state[0]:
            return None
        return RecurrentState(layer.conv_states[0], layer.recurrent_states[0])

    def store_state(self, cache: Cache, state: RecurrentState) -> None:
        cache.update_conv_state(state.conv, self.layer_idx)
        cache.update_recurrent_state(state.ssm, self.layer_idx)


def mask_padding(x_BTD: Tensor, padding_mask_BT: Tensor | None) -> Tensor:
    """Zeroes the padded positions, so that nothing of them enters a recurrent state."""
    if padding_mask_BT is None:
        return x_BTD
    return x_BTD * padding_mask_BT[..., None].to(x_BTD.dtype)
