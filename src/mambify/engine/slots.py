"""The device's side of decoding: fixed buffers with a slot a sequence, and the step that takes each one token on.

A step is the same sequence of kernels whatever the slots hold, and waits for nothing, so that it can be recorded as a
CUDA graph. A slot that has nothing to do takes part and stays as it is.

Letters: S slots, L length of the buffers, F tokens that can be forced, H query heads, G key/value heads, P head
dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mambify.config import LINEAR
from mambify.engine.sampling import Sampling
from mambify.mixers import MixerContext, RecurrentState
from mambify.mixers.attention import SlotKV
from mambify.model import HybridBlock, HybridForCausalLM
from mambify.ops.draw import draw_tokens, uniform


@dataclass
class Control:
    """Where each slot stands; every tensor has the slots as its first axis.

    Attributes:
        token_S: to be read next, at position ``length``.
        length_S: tokens read so far.
        active_S: whether the slot moves on; false from the end of a turn until the host has seen it.
        ended_S: whether a turn has ended since the host last set the slot.
        forced_SF, next_forced_S, num_forced_S: tokens that follow ``token`` whatever the model says; how many of them
            have been given, and how many there are.
        budget_S: tokens that may still be drawn in this turn.
        seed_S: of the slot's uniform numbers; with the position it decides them.
        history_SL: tokens by position; one place more than the buffers, for what nobody reads.
    """

    token_S: Tensor
    length_S: Tensor
    active_S: Tensor
    ended_S: Tensor
    forced_SF: Tensor
    next_forced_S: Tensor
    num_forced_S: Tensor
    budget_S: Tensor
    seed_S: Tensor
    history_SL: Tensor

    @classmethod
    def empty(cls, slots: int, length: int, num_forced: int, device: torch.device) -> Control:
        """Slots that hold nothing."""

        def zeros(*sizes: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(slots, *sizes, dtype=dtype, device=device)

        flags = {"dtype": torch.bool}
        return cls(
            zeros(), zeros(), zeros(**flags), zeros(**flags), zeros(num_forced), zeros(), zeros(), zeros(), zeros(),
            zeros(length + 1, dtype=torch.int32),
        )  # fmt: skip

    def first(self, slots: int) -> Control:
        """The first slots, as views."""
        return Control(*(tensor[:slots] for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [getattr(self, field.name) for field in fields(self)]


SlotState = SlotKV | RecurrentState


class Slots:
    """Buffers for ``num_slots`` sequences of up to ``length`` tokens, and the step over the first of them.

    Args:
        model: any mix of layers, in its own dtype and on its own device.
        num_forced: the most tokens that can be forced at once.
        stop_ids: tokens that end a turn.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        *,
        num_slots: int,
        length: int,
        num_forced: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
    ) -> None:
        self.model, self.sampling = model, sampling
        self.num_slots, self.length = num_slots, length
        device = model.device
        self.control = Control.empty(num_slots, length, max(num_forced, 1), device)
        self._stops_K = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        self.states = [self._new_state(layer) for layer in self._layers()]

    def _layers(self) -> list[HybridBlock]:
        return list(self.model.model.layers)  # type: ignore[arg-type]

    @torch.inference_mode()
    def _new_state(self, block: HybridBlock) -> SlotState:
        """Zeros in the shape of what the block's mixer carries, found by showing it one token."""
        config, device, dtype = self.model.config, self.model.device, self.model.dtype
        assert config.layer_types and config.num_key_value_heads and config.head_dim
        if config.layer_types[block.layer_idx] != LINEAR:
            shape = (self.num_slots, config.num_key_value_heads, self.length, config.head_dim)
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            return SlotKV(keys, values, self.control.length_S)
        _, state = block.mixer(torch.zeros(1, 1, config.hidden_size, dtype=dtype, device=device), MixerContext(), None)
        return RecurrentState(*(part.new_zeros(self.num_slots, *part.shape[1:]) for part in state))

    def step(self, slots: int) -> None:
        """Reads each slot's token and finds its next one, in place, for the first ``slots`` of them."""
        c = self.control.first(slots)
        logits_SV = self._forward(c)
        drawn_S = draw_tokens(logits_SV, uniform(c.seed_S, c.length_S), **self.sampling.settings())
        forced_S = c.next_forced_S < c.num_forced_S
        place_S1 = c.next_forced_S.clamp(max=c.forced_SF.shape[1] - 1)[:, None]
        token_S = torch.where(forced_S, c.forced_SF.gather(1, place_S1)[:, 0], drawn_S)
        speaks_S = c.active_S & ~forced_S
        c.next_forced_S += c.active_S & forced_S
        c.budget_S -= speaks_S.long()
        stops_S = (token_S[:, None] == self._stops_K).any(1) | (c.budget_S <= 0)
        ends_S = speaks_S & stops_S
        c.length_S += c.active_S.long()
        written_S1 = torch.where(c.active_S, c.length_S, self.length)[:, None]
        c.history_SL.scatter_(1, written_S1, token_S[:, None].to(torch.int32))
        c.token_S.copy_(torch.where(c.active_S, token_S, c.token_S))
        c.ended_S |= ends_S
        c.active_S &= ~ends_S

    def _forward(self, c: Control) -> Tensor:
        """Logits ``[S, V]`` after each slot's token; what its layers carry is taken on with it."""
        core = self.model.model
        x_S1D = core.embed_tokens(c.token_S)[:, None]
        with_positions = MixerContext()
        if self.model.config.attention_layers:
            with_positions = MixerContext(position_embeddings=core.rotary_emb(x_S1D, c.length_S[:, None]))
        slots = len(c.token_S)
        for block, state in zip(self._layers(), self.states, strict=True):
            normed_S1D = block.input_layernorm(x_S1D)
            if isinstance(state, SlotKV):
                own = SlotKV(state.keys_SGLP[:slots], state.values_SGLP[:slots], c.length_S)
                y_S1D, _ = block.mixer(normed_S1D, with_positions, own)
            else:
                carried = RecurrentState(*(part[:slots] for part in state))
                y_S1D, after = block.mixer(normed_S1D, MixerContext(), carried)
                for part, new in zip(carried, after, strict=True):
                    active = c.active_S.view(-1, *[1] * (part.dim() - 1))
                    part.copy_(torch.where(active, new, part))
            x_S1D = block.feed_forward(x_S1D + y_S1D)
        logits_SV: Tensor = self.model.lm_head(core.norm(x_S1D[:, 0]))
        return logits_SV

    def write_prefix(self, ids: Sequence[int]) -> list[RecurrentState | None]:
        """Reads ``ids`` into the keys and values of every slot; returns what a recurrent layer carries after them.

        Attention reads only as far as a slot has come, so its buffers need no cleaning; a recurrent state must be set
        whenever a slot begins anew (:meth:`begin`).
        """
        found: list[RecurrentState | None] = []
        cache = None
        if ids:
            given = torch.tensor([list(ids)], device=self.model.device)
            cache = self.model.model(input_ids=given, use_cache=True).past_key_values
        for block, state in zip(self._layers(), self.states, strict=True):
            if isinstance(state, SlotKV):
                if cache is not None:
                    layer = cache.layers[block.layer_idx]
                    keep = layer.keys.shape[2]  # a sliding window keeps the last ones only
                    state.keys_SGLP[:, :, len(ids) - keep : len(ids)] = layer.keys
                    state.values_SGLP[:, :, len(ids) - keep : len(ids)] = layer.values
                found.append(None)
            elif cache is None:
                found.append(RecurrentState(*(part.new_zeros(1, *part.shape[1:]) for part in state)))
            else:
                found.append(block.mixer.load_state(cache))
        return found

    def begin(self, slot_E: Tensor, carried: Sequence[RecurrentState | None]) -> None:
        """Puts what recurrent layers carry after the prefix into the slots ``slot_E``."""
        for state, start in zip(self.states, carried, strict=True):
            if isinstance(state, RecurrentState) and start is not None:
                for part, value in zip(state, start, strict=True):
                    part[slot_E] = value.to(part.dtype)

    def move(self, source_E: Tensor, target_E: Tensor) -> None:
        """Copies slots, control and state, to other places."""
        for tensor in self.control.tensors():
            tensor[target_E] = tensor[source_E]
        for state in self.states:
            for part in state[:2]:  # a SlotKV's lengths are the control's
                part[target_E] = part[source_E]
