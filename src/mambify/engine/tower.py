"""A model in fixed buffers that reads tokens which may yet be rejected: what everything that decodes stands on.

Reading T tokens changes nothing that cannot be taken back: keys and values beyond a slot's length are written over, and
recurrent layers keep the tokens in rings beside their state (:mod:`mambify.ops.ring`). :meth:`Tower.keep` then says how
many of them stand. A read is the same sequence of kernels whatever the slots hold, and waits for nothing.

Letters: S slots, T tokens read at once, L length of the buffers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from mambify.engine.fused import FusedStep, can_fuse, can_overlap, steps_at_once
from mambify.engine.fused_parts import Product
from mambify.engine.memory import packs
from mambify.engine.placement import require_one_place
from mambify.engine.prefill import read_prompts, read_prompts_ahead
from mambify.errors import InvalidOptionError, did_you_mean
from mambify.mixers import MixerContext, RecurrentMixer, RecurrentState, ReplayState
from mambify.mixers.attention import SlotKV
from mambify.model import HybridBlock, HybridForCausalLM
from mambify.ops.ring import RingPlace
from mambify.ops.rounds import move_on
from mambify.trimmed_head import known_logits


class Tower:
    """Slots for ``num_slots`` sequences of one model.

    Args:
        model: in evaluation mode.
        length: the most tokens a slot may hold.
        most_new: the most tokens of one read.
        active_S: which slots take part; shared with whoever sets it.
        final: one token is read at a time and always stands.
        backend: "modules" runs the model's own, "fused" :mod:`mambify.engine.fused`; "auto" takes this on a GPU, and on
            a CPU where weights are packed for it (:func:`mambify.engine.memory.packs`).
        overlap: as :class:`mambify.engine.fused.FusedStep` takes it; where the device can by default.

    Attributes:
        length_S: tokens that stand in each slot.
        states: what each layer carries, in the slots' buffers.
        place: where recurrent layers stand in their rings.

    Raises:
        InvalidOptionError: a backend that there is not, or not for this model.
        UnsupportedError: weights that are not all on one device.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        *,
        num_slots: int,
        length: int,
        most_new: int,
        active_S: Tensor,
        final: bool = False,
        backend: str = "auto",
        overlap: bool | None = None,
    ) -> None:
        require_one_place(model)
        available = ("modules", "fused") if can_fuse(model) else ("modules",)
        if backend not in ("auto", *available):
            raise InvalidOptionError(f"no backend '{backend}' for this model: {did_you_mean(backend, available)}")
        self.model, self.num_slots, self.length = model, num_slots, length
        device, dtype, config = model.device, model.dtype, model.config
        self.length_S = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.place = replace(RingPlace.empty(num_slots, most_new, device=device), active_S=active_S)
        self._blocks = [block for block in model.model.layers if isinstance(block, HybridBlock)]
        self.states: list[SlotKV | ReplayState | RecurrentState] = []
        self._packs = packs(model)
        quicker = device.type == "cuda" or self._packs
        fuses = backend == "fused" or (backend == "auto" and quicker and "fused" in available)
        # A token that stands whatever comes of it needs no ring. On a CPU the plain step is the quicker one.
        steps = final and most_new == 1 and device.type == "cpu" and not fuses
        for block in self._blocks:
            if isinstance(block.mixer, RecurrentMixer) and steps:
                self.states.append(_empty_state(block, num_slots, dtype, device))
            elif isinstance(block.mixer, RecurrentMixer):
                self.states.append(block.mixer.replay_state(num_slots, self.place))
            else:
                assert config.num_key_value_heads and config.head_dim
                shape = (num_slots, config.num_key_value_heads, length + most_new, config.head_dim)
                keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                self.states.append(SlotKV(keys, values, self.length_S))
        self._in_place = False  # whether states are views that others see as well
        self._overlap = can_overlap(device) if overlap is None else overlap
        self._places = length + most_new
        self._at_once = fuses and final and most_new == 1 and not self._packs and steps_at_once(model, num_slots)
        self._fused: FusedStep | None = self._fused_step() if fuses else None

    def _fused_step(self, product: Product | None = None) -> FusedStep:
        return FusedStep(
            self.model,
            [state for state in self.states if not isinstance(state, RecurrentState)],
            self.length_S,
            places=self._places,
            at_once=self._at_once,
            overlap=self._overlap,
            packs=self._packs,
            product=product,
        )

    def first(self, slots: int) -> Tower:
        """The first slots as a tower over the same buffers: a read of them costs no more than of so many."""
        part = copy.copy(self)
        part.num_slots, part.length_S, part.place = slots, self.length_S[:slots], self.place.first(slots)
        part.states = [state.first(slots) for state in self.states]
        part._in_place = self._in_place = True
        if self._fused is not None:
            part._fused = part._fused_step(self._fused.product)
        return part

    def read(self, token_ST: Tensor, *, fold: bool = False) -> Tensor:
        """Logits ``[S, T, V]`` after each of T tokens, put behind those that stand in each slot.

        Of a trimmed head, those of the words that it knows.

        Args:
            fold: recurrent layers take their states over everything that stands, not only where their rings run full.
        """
        return self.logits(self.stream(token_ST, fold=fold))

    def stream(self, token_ST: Tensor, features_STD: Tensor | None = None, *, fold: bool = False) -> Tensor:
        """As :meth:`read`, the hidden states ``[S, T, D]`` before the final norm.

        Args:
            features_STD: for a draft that reads them: of each token the hidden state at the place before it.
        """
        core = self.model.model
        place = replace(self.place, eager=fold)
        if self._fused is not None:
            return self._fused.stream(token_ST, place, features_STD)
        x_STD = core.embed(token_ST, features_STD)
        position_ST = self.length_S[:, None] + torch.arange(token_ST.shape[1], device=token_ST.device)
        with_positions = MixerContext()
        if self.model.config.attention_layers:
            with_positions = MixerContext(position_embeddings=core.rotary_emb(x_STD, position_ST))
        for index, (block, state) in enumerate(zip(self._blocks, self.states, strict=True)):
            context = with_positions if isinstance(state, SlotKV) else MixerContext()
            here = state._replace(place=place) if isinstance(state, ReplayState) else state
            y_STD, after = block.mixer(block.input_layernorm(x_STD), context, here)
            if isinstance(state, RecurrentState):
                stepped = _stepped(state, after, self.place.active_S)
                if self._in_place:
                    state.conv.copy_(stepped.conv)
                    state.ssm.copy_(stepped.ssm)
                else:
                    self.states[index] = stepped
            x_STD = block.feed_forward(x_STD + y_STD)
        return x_STD

    def logits(self, x_STD: Tensor) -> Tensor:
        """Of hidden states that :meth:`stream` gave."""
        if self._fused is not None:
            return self._fused.logits(x_STD)
        return known_logits(self.model.lm_head, self.model.model.norm(x_STD))

    def keep(
        self, count: Tensor | int, read: int, *, plus: int = 0, fold: bool = False, goes_on_S: Tensor | None = None
    ) -> None:
        """After a read of ``read`` tokens: the first ``count + plus`` of them stand, in active slots.

        Args:
            count: of each slot, ``[S]``, or of all.
            plus: may make less than 0 of it: then tokens that were kept before do not stand after all, none that a
                state was taken over.
            fold: as it was said to :meth:`read`.
            goes_on_S: which slots are active from then on; the same by default.
        """
        count_S, plus = (count, plus) if isinstance(count, Tensor) else (None, count + plus)
        above = replace(self.place, eager=fold).folds_above(read)
        move_on(
            self.place, self.length_S, count_S, plus=plus, folds_above=above, pends=not self._at_once,
            goes_on_S=goes_on_S,
        )  # fmt: skip

    def pretend(self, length: int) -> None:
        """Every slot goes on as if it held ``length`` tokens, of random contents: to measure what reading then costs.

        Args:
            length: at most the slots' own.
        """
        self.rewind(length)
        for state in self.states:
            for part in state[:2]:
                part.normal_()

    def rewind(self, length: int) -> None:
        """Sets how many tokens every slot holds, whatever they are, of which nothing is pending."""
        self.length_S.fill_(length)
        self.place.head_S.zero_()
        self.place.pending_S.zero_()

    def refresh(self) -> None:
        """Makes anew, in place, what was made of weights: for when these have changed where they lie."""
        for block, state in zip(self._blocks, self.states, strict=True):
            if isinstance(state, ReplayState) and isinstance(block.mixer, RecurrentMixer):
                block.mixer.refresh(state)
        if self._fused is not None:
            self._fused.refresh()

    def begin_all(self, ids: Sequence[int]) -> list[RecurrentState | None]:
        """Every slot begins with the same prompt, which is read once and may be empty; none is active meanwhile.

        Returns:
            What recurrent layers carry after it, for :meth:`begin_again`.
        """
        self.begin([0], [ids])
        self.rewind(len(ids))
        carried: list[RecurrentState | None] = []
        for state in self.states:
            if isinstance(state, SlotKV):
                for part_SGLP in state[:2]:
                    part_SGLP[1:, :, : len(ids)] = part_SGLP[:1, :, : len(ids)]
                carried.append(None)
            else:
                carried.append(RecurrentState(state.conv[:1].clone(), state.ssm[:1].clone()))
        return carried

    def begin_again(self, slot_E: Tensor, carried: Sequence[RecurrentState | None]) -> None:
        """Slots that went on from :meth:`begin_all` stand there again, but for ``length_S``, which is the caller's.

        Attention has its keys and values still: what came after is behind a slot's length.
        """
        self.place.head_S.index_fill_(0, slot_E, 0)
        self.place.pending_S.index_fill_(0, slot_E, 0)
        for state, start in zip(self.states, carried, strict=True):
            if start is not None:
                state.conv[slot_E], state.ssm[slot_E] = start.conv, start.ssm  # type: ignore[union-attr]

    def move(self, source_E: Tensor, target_E: Tensor) -> None:
        """Copies slots to other places."""
        rings = [state.ring for state in self.states if isinstance(state, ReplayState)]
        counts = (self.length_S, self.place.head_S, self.place.pending_S)
        for part in chain(counts, *(state[:2] for state in self.states), *rings):
            part[target_E] = part[source_E]

    def begin(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Empties slots and reads a prompt into each, which may be empty; they are not active meanwhile."""
        self._empty(slots, prompts)
        read_prompts(self.model, self.states, slots, prompts)

    def begin_with(self, draft: Tower, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """As :meth:`begin`, prompts without their last tokens; and into the same slots of a draft that reads hidden
        states the whole prompts.

        Returns:
            The draft's own hidden states after the prompts, one for each slot, ``[E, D]``.
        """
        self._empty(slots, [ids[:-1] for ids in prompts])
        draft._empty(slots, prompts)
        both = (self.model, self.states), (draft.model, draft.states)
        return read_prompts_ahead(*both, slots, prompts)

    def _empty(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        for slot, ids in zip(slots, prompts, strict=True):
            self.length_S[slot] = len(ids)
            self.place.head_S[slot] = 0
            self.place.pending_S[slot] = 0


def _stepped(before: RecurrentState, after: RecurrentState, active_S: Tensor) -> RecurrentState:
    """The state after a plain step, in which slots that are not active did not take part."""
    if bool(active_S.all()):
        return after

    def chosen(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(active_S.view(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old)

    return RecurrentState(chosen(before.conv, after.conv), chosen(before.ssm, after.ssm))


def _empty_state(block: HybridBlock, rows: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
    """What a recurrent block carries before the first token: zeros, in shapes found by showing it one token."""
    assert isinstance(block.mixer, RecurrentMixer)
    width: int = block.input_layernorm.weight.shape[0]
    _, state = block.mixer(torch.zeros(1, 1, width, dtype=dtype, device=device), MixerContext(), None)
    return RecurrentState(*(part.new_zeros(rows, *part.shape[1:]) for part in state))
