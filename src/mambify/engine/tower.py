"""A model in fixed buffers that reads tokens which may yet be rejected: what target and draft of speculation both are.

Reading T tokens changes nothing that cannot be taken back: keys and values beyond a slot's length are written over, and
recurrent layers keep the tokens in rings beside their state (:mod:`mambify.ops.ring`). :meth:`Tower.keep` then says how
many of them stand. A read is the same sequence of kernels whatever the slots hold, and waits for nothing.

Letters: S slots, T tokens read at once, L length of the buffers, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mambify.mixers import MixerContext, RecurrentMixer, ReplayState
from mambify.mixers.attention import SlotKV
from mambify.model import HybridBlock, HybridForCausalLM
from mambify.ops.ring import RingPlace
from mambify.trimmed_head import known_logits


class Tower:
    """Slots for ``num_slots`` sequences of one model.

    Args:
        model: in evaluation mode.
        length: the most tokens a slot may hold.
        most_new: the most tokens of one read.
        active_S: which slots take part; shared with whoever sets it.

    Attributes:
        length_S: tokens that stand in each slot.
    """

    def __init__(
        self, model: HybridForCausalLM, *, num_slots: int, length: int, most_new: int, active_S: Tensor
    ) -> None:
        self.model, self.num_slots, self.length = model, num_slots, length
        device, dtype, config = model.device, model.dtype, model.config
        self.length_S = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.place = replace(RingPlace.empty(num_slots, most_new, device=device), active_S=active_S)
        self._blocks = [block for block in model.model.layers if isinstance(block, HybridBlock)]
        self._states: list[SlotKV | ReplayState] = []
        for block in self._blocks:
            if isinstance(block.mixer, RecurrentMixer):
                self._states.append(block.mixer.replay_state(num_slots, self.place))
            else:
                assert config.num_key_value_heads and config.head_dim
                shape = (num_slots, config.num_key_value_heads, length + most_new, config.head_dim)
                keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                self._states.append(SlotKV(keys, values, self.length_S))

    def read(self, token_ST: Tensor, *, fold: bool = False, logits: bool = True) -> Tensor | None:
        """Logits ``[S, T, V]`` after each of T tokens, put behind those that stand in each slot.

        Of a trimmed head, those of the words that it knows.

        Args:
            fold: recurrent layers take their states over everything that stands, not only where their rings run full.
            logits: ``False`` spares the head; the result is then ``None``.
        """
        core = self.model.model
        place = replace(self.place, eager=fold)
        x_STD = core.embed_tokens(token_ST)
        position_ST = self.length_S[:, None] + torch.arange(token_ST.shape[1], device=token_ST.device)
        with_positions = MixerContext(position_embeddings=core.rotary_emb(x_STD, position_ST))
        for block, state in zip(self._blocks, self._states, strict=True):
            replays = isinstance(state, ReplayState)
            here = state._replace(place=place) if isinstance(state, ReplayState) else state
            y_STD, _ = block.mixer(block.input_layernorm(x_STD), MixerContext() if replays else with_positions, here)
            x_STD = block.feed_forward(x_STD + y_STD)
        if not logits:
            return None
        return known_logits(self.model.lm_head, core.norm(x_STD))

    def keep(self, count_S: Tensor, read: int, *, fold: bool = False) -> None:
        """After a read of ``read`` tokens: the first ``count_S`` of them stand, in active slots.

        Args:
            fold: as it was said to :meth:`read`.
        """
        replace(self.place, eager=fold).advance(count_S, read)
        self.length_S += torch.where(self.place.active_S, count_S, 0)

    def take_back(self, count_S: Tensor) -> None:
        """The last ``count_S`` tokens do not stand after all, in active slots: none that a state was taken over."""
        taken_S = torch.where(self.place.active_S, count_S, 0)
        self.length_S -= taken_S
        self.place.pending_S.sub_(taken_S)
        self.place.head_S.sub_(taken_S).remainder_(self.place.capacity)

    def begin(self, slot: int, ids: Sequence[int], *, chunk: int = 2048) -> None:
        """Empties a slot and reads ``ids`` into it, ``chunk`` tokens at a time; the slot is not active meanwhile."""
        device = self.model.device
        self.length_S[slot] = len(ids)
        self.place.head_S[slot] = 0
        self.place.pending_S[slot] = 0
        cache = None
        for start in range(0, len(ids), chunk):
            given = torch.tensor([ids[start : start + chunk]], device=device)
            cache = self.model.model(input_ids=given, past_key_values=cache, use_cache=True).past_key_values
        row = torch.tensor([slot], device=device)
        for block, state in zip(self._blocks, self._states, strict=True):
            if isinstance(state, ReplayState):
                carried = None if cache is None else block.mixer.load_state(cache)
                if carried is None:
                    state.ssm[slot] = 0
                    state.conv[slot] = 0
                else:
                    state.load(row, carried)
            elif cache is not None:
                layer = cache.layers[block.layer_idx]
                kept = layer.keys.shape[2]  # a sliding window keeps the last ones only
                state.keys_SGLP[slot, :, len(ids) - kept : len(ids)] = layer.keys[0]
                state.values_SGLP[slot, :, len(ids) - kept : len(ids)] = layer.values[0]
