"""What every mixer is: a module ``y, state = mixer(x, context, state)``, and how its state meets a cache.

Legend: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mambify.mixers import initial
from mambify.ops.causal_conv import causal_conv, causal_conv_step
from mambify.ops.conv_replay import conv_replay, load_window
from mambify.ops.ring import RingPlace
from mambify.ops.selective_replay import SelectiveRing
from mambify.ops.ssd_replay import SSDRing

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
        ssm: the state-space state in float32, ``[B, H, P, N]`` (Mamba2) or ``[B, J, M, N]`` (Mamba1; J = 1 of the
            stock one).
    """

    conv: Tensor
    ssm: Tensor

    def first(self, rows: int) -> RecurrentState:
        """The first rows, as views."""
        return RecurrentState(self.conv[:rows], self.ssm[:rows])


class ReplayState(NamedTuple):
    """What a recurrent layer keeps where new tokens may yet be rejected: fixed buffers, a slot a sequence.

    Attributes:
        conv: inputs of the convolution in a ring, ``[S, R, C]``.
        ssm: the state before what is pending, float32, ``[S, …]`` as in :class:`RecurrentState`.
        ring: the tokens since then, as :mod:`mambify.ops.ssd_replay` or :mod:`mambify.ops.selective_replay` keep them.
        place: where each slot stands in the rings.
        A: the decay rates −exp(A_log), made when the buffers are; :meth:`RecurrentMixer.refresh` after weights changed.
    """

    conv: Tensor
    ssm: Tensor
    ring: SSDRing | SelectiveRing
    place: RingPlace
    A: Tensor

    def first(self, slots: int) -> ReplayState:
        """The first slots, as views."""
        ring, place = self.ring.first(slots), self.place.first(slots)
        return ReplayState(self.conv[:slots], self.ssm[:slots], ring, place, self.A)

    def load(self, row_E: Tensor, state: RecurrentState) -> None:
        """Begins slots ``row_E``, of which nothing is pending, with the state after their prompts (``E`` rows)."""
        self.ssm[row_E] = state.ssm.to(self.ssm.dtype)
        load_window(self.conv, self.place, row_E, state.conv)


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

    def drawn_anew(self, generator: torch.Generator) -> AttentionWeights:
        """Projections of the same shapes as PyTorch makes them, biases of zero, and norms that scale nothing."""

        def drawn(weight_OI: Tensor) -> Tensor:
            return initial.linear_(torch.empty_like(weight_OI), generator)

        biases = (
            None if bias is None else torch.zeros_like(bias)
            for bias in (self.q_bias, self.k_bias, self.v_bias, self.o_bias)
        )
        return AttentionWeights(drawn(self.q), drawn(self.k), drawn(self.v), drawn(self.o), *biases)


class ProjectionRows(NamedTuple):
    """The rows of a recurrent mixer's ``in_proj`` by what they give: views, so that writing to them writes the weight.

    Attributes:
        z, x, B, C, dt: gate, values, keys, queries and step sizes, each ``[rows, D]``.
    """

    z: Tensor
    x: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor


class Mixer(nn.Module):
    """Base of the modules that mix tokens. A new one is a file here and a row in :data:`MIXERS`."""

    #: parameters that stay float32 whatever dtype the model is cast to
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    #: names of the starts that :meth:`init_from_attention` knows; empty for attention itself and for stock mixers
    starts: ClassVar[tuple[str, ...]] = ()

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
    def init_from_attention(self, weights: AttentionWeights, *, start: str, generator: torch.Generator) -> None:
        """Fills this mixer's parameters from the attention layer it replaces; ``start`` is one of :attr:`starts`."""
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
    """A mixer whose state is a :class:`RecurrentState`, kept in a linear-attention cache layer.

    Given a :class:`ReplayState` instead, it reads new tokens that may yet be rejected and changes the buffers in place.
    What attention has no counterpart for can be set in terms of heads, whatever the layout: :meth:`set_decay`,
    :meth:`set_gate`, :meth:`turn_queries`, :meth:`scale_activations`. Stock mixers, which are never made from attention
    (:attr:`starts` is empty), have none of these.
    """

    in_proj: nn.Linear
    conv1d: nn.Conv1d
    out_proj: nn.Linear
    ops_backend: str
    num_heads: int
    head_dim: int

    @property
    def rows(self) -> ProjectionRows:
        """``in_proj``'s rows."""
        raise NotImplementedError

    def convolve(
        self, x_BTC: Tensor, context: MixerContext, state: RecurrentState | ReplayState | None
    ) -> tuple[Tensor, Tensor]:
        """``conv1d`` over T tokens, causal, continuing from ``state``, then SiLU.

        Returns:
            ``[B, T, C]``, and the window after the last token, which a :class:`ReplayState` keeps itself.
        """
        weight_CK, bias_C = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if isinstance(state, ReplayState):
            y_BTC = conv_replay(x_BTC, weight_CK, bias_C, state.conv, state.place, backend=self.ops_backend)
            return y_BTC, state.conv
        if x_BTC.shape[1] == 1 and state is not None:
            y_BC, conv = causal_conv_step(x_BTC[:, 0], weight_CK, bias_C, state.conv)
            return y_BC[:, None], conv
        return causal_conv(
            x_BTC,
            weight_CK,
            bias_C,
            initial_state_BCL=None if state is None else state.conv,
            seq_idx_BT=context.seq_idx_BT,
            backend=self.ops_backend,
        )

    def replay_state(self, slots: int, place: RingPlace) -> ReplayState:
        """Empty buffers for ``slots`` sequences, in this mixer's dtype and on its device."""
        raise NotImplementedError

    @torch.no_grad()
    def refresh(self, state: ReplayState) -> None:
        """Makes anew, in place, what buffers hold of the weights: for when these have changed."""
        state.A.copy_(self._decay())

    def _decay(self) -> Tensor:
        """The decay rates −exp(A_log) in float32, as the operations take them."""
        raise NotImplementedError

    @torch.no_grad()
    def set_decay(self, kept_H: Tensor) -> None:
        """Makes each head keep this share of its state at every token, in (0, 1), whatever the token; A is 1."""
        raise NotImplementedError

    @torch.no_grad()
    def set_gate(self, row_D: Tensor) -> None:
        """Gives every channel the same gate, ``SiLU(row · h)``."""
        self.rows.z.copy_(row_D.expand_as(self.rows.z))

    @torch.no_grad()
    def turn_queries(self, cos_HJ: Tensor, sin_HJ: Tensor) -> None:
        """Turns the pairs (j, j + P/2) of each head's query by an angle and scales them: its rows and its bias.

        Args:
            cos_HJ, sin_HJ: scale times cosine and sine of the angle, J = P/2 pairs.
        """
        bias = self.query_bias()
        for place in (self.rows.C,) if bias is None else (self.rows.C, bias[:, None]):
            first, second = place.view(self.num_heads, 2, self.head_dim // 2, -1).unbind(1)
            cos_HJ1, sin_HJ1 = cos_HJ[..., None], sin_HJ[..., None]
            turned = torch.stack([first * cos_HJ1 - second * sin_HJ1, second * cos_HJ1 + first * sin_HJ1], 1)
            place.copy_(turned.view_as(place))

    def query_bias(self) -> Tensor | None:
        """What is added to the queries ``[H·P]``, as a view; ``None`` where nothing is."""
        raise NotImplementedError

    @torch.no_grad()
    def scale_activations(self, x_BTD: Tensor, *, values: float, keys: float) -> None:
        """Scales the convolution so that what enters SiLU has this root mean square a head on the given input."""
        raise NotImplementedError

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
