"""The device's side of decoding: fixed buffers with a slot a sequence, and the step that takes each one token on.

A step is the same sequence of kernels whatever the slots hold, and waits for nothing, so that it can be recorded as a
CUDA graph. A slot that has nothing to do takes part and stays as it is.

Letters: S slots, L length of the buffers, F tokens that can be forced, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mambify.engine.sampling import Sampling
from mambify.engine.tower import Tower
from mambify.mixers import RecurrentState
from mambify.model import HybridForCausalLM
from mambify.ops.draw import draw_tokens, uniform
from mambify.trimmed_head import known_ids


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
    def of(cls, tower: Tower, num_forced: int) -> Control:
        """Of a tower's slots, by whose lengths and activity it goes."""
        length_S, active_S = tower.length_S, tower.place.active_S

        def zeros(*sizes: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(tower.num_slots, *sizes, dtype=dtype, device=length_S.device)

        return cls(
            zeros(), length_S, active_S, zeros(dtype=torch.bool), zeros(num_forced), zeros(), zeros(), zeros(), zeros(),
            zeros(tower.length + 1, dtype=torch.int32),
        )  # fmt: skip

    def first(self, slots: int) -> Control:
        """The first slots, as views."""
        return Control(*(tensor[:slots] for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [getattr(self, field.name) for field in fields(self)]


class Slots:
    """Slots for ``num_slots`` sequences of up to ``length`` tokens, and the step over the first of them.

    Args:
        model: any mix of layers, in its own dtype and on its own device.
        sizes: numbers of slots that a step may be over, the largest first: that is how many there are.
        num_forced: the most tokens that can be forced at once.
        stop_ids: tokens that end a turn.
        backend: as :class:`mambify.engine.tower.Tower` takes it.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        *,
        sizes: Sequence[int],
        length: int,
        num_forced: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        backend: str = "auto",
    ) -> None:
        device = model.device
        self.num_slots, self.length = sizes[0], length
        active_S = torch.zeros(sizes[0], dtype=torch.bool, device=device)
        self._tower = Tower(
            model, num_slots=sizes[0], length=length, most_new=1, active_S=active_S, final=True, backend=backend
        )
        self._towers = {size: self._tower if size == sizes[0] else self._tower.first(size) for size in sizes}
        self.control = Control.of(self._tower, max(num_forced, 1))
        self._stops_K = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        self._known_ids_W = known_ids(model.lm_head)
        self._settings = {size: sampling.row_settings(size, device) for size in sizes}

    def step(self, slots: int) -> None:
        """Reads each slot's token and finds its next one, in place, for the first ``slots`` of them."""
        c, tower = self.control.first(slots), self._towers[slots]
        logits_S1V = tower.read(c.token_S[:, None])
        number_S = uniform(c.seed_S, c.length_S)
        drawn_S = draw_tokens(logits_S1V[:, 0], number_S, ids_V=self._known_ids_W, **self._settings[slots])
        forced_S = c.next_forced_S < c.num_forced_S
        place_S1 = c.next_forced_S.clamp(max=c.forced_SF.shape[1] - 1)[:, None]
        token_S = torch.where(forced_S, c.forced_SF.gather(1, place_S1)[:, 0], drawn_S)
        speaks_S = c.active_S & ~forced_S
        c.next_forced_S += c.active_S & forced_S
        c.budget_S -= speaks_S.long()
        stops_S = (token_S[:, None] == self._stops_K).any(1) | (c.budget_S <= 0)
        ends_S = speaks_S & stops_S
        tower.keep(1, 1)
        written_S1 = torch.where(c.active_S, c.length_S, self.length)[:, None]
        c.history_SL.scatter_(1, written_S1, token_S[:, None].to(torch.int32))
        c.token_S.copy_(torch.where(c.active_S, token_S, c.token_S))
        c.ended_S |= ends_S
        c.active_S &= ~ends_S

    def write_prefix(self, ids: Sequence[int]) -> list[RecurrentState | None]:
        """Reads what all sequences begin with into every slot; returns what :meth:`begin` needs of it."""
        self._tower.refresh()  # weights may have changed since the last run
        return self._tower.begin_all(ids)

    def begin(self, slot_E: Tensor, carried: Sequence[RecurrentState | None]) -> None:
        """Puts the slots ``slot_E`` back behind the prefix."""
        self._tower.begin_again(slot_E, carried)

    def move(self, source_E: Tensor, target_E: Tensor) -> None:
        """Copies slots, control and state, to other places."""
        for tensor in self.control.tensors():
            tensor[target_E] = tensor[source_E]
        self._tower.move(source_E, target_E)
