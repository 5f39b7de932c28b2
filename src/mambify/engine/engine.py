"""Decoding many sequences at once: the host's side, which hands out slots and listens.

A sequence is a series of turns: tokens that are given, then tokens that are drawn until one of them is a stop or the
turn's budget is spent. When a turn ends its owner says what follows, or that the sequence is over; then the slot goes
to the next sequence. The device never waits for that: while it works on one window of steps, the host looks at what
the one before gave.

On a GPU the step is recorded as a CUDA graph, once for every size the batch shrinks to as the last sequences end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mambify.engine.looks import Look, Looks
from mambify.engine.memory import check_memory
from mambify.engine.recording import recorded
from mambify.engine.sampling import Sampling
from mambify.engine.slots import Slots
from mambify.errors import InvalidOptionError
from mambify.model import HybridForCausalLM

_WINDOW = 4  # steps between two looks of the host
_SMALLEST = 32  # slots below which a batch does not shrink


class Turn(NamedTuple):
    """What is given, and how many tokens may then be drawn."""

    given: Sequence[int]
    limit: int


class Speaker(Protocol):
    """One sequence to decode.

    Attributes:
        seed: decides its random numbers, together with their positions.
    """

    seed: int

    def begin(self) -> Turn:
        """The prompt, not empty, and the first turn's budget."""
        ...

    def hear(self, ids: list[int]) -> Turn | None:
        """Told what was drawn; says how it goes on.

        The last of ``ids`` has not been read by the model. The given tokens of the next turn, not empty, take its
        place. ``None`` ends the sequence.
        """
        ...


@dataclass
class _Seat:
    """What the host knows of a slot: who sits there, where its drawn tokens begin, from which look on it counts."""

    speaker: Speaker | None = None
    start: int = 0
    since: int = 0


class DecodeEngine:
    """Continues any number of sequences, ``num_slots`` at a time.

    Args:
        model: in its own dtype, on its own device, in evaluation mode.
        num_slots: sequences worked on at once.
        max_length: the most tokens a sequence may have, prompt included.
        max_given: the most tokens that may be given at once beyond the common beginning of all prompts.
        stop_ids: tokens that end a turn.
        backend: as :class:`mambify.engine.tower.Tower` takes it.

    Raises:
        InvalidOptionError: the buffers do not fit the device's free memory, or a repetition penalty.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        *,
        num_slots: int,
        max_length: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        max_given: int = 64,
        backend: str = "auto",
    ) -> None:
        if sampling.penalises:
            raise InvalidOptionError("many sequences at once are drawn without repetition_penalty: leave it at 1")
        check_memory([model], num_slots=num_slots, length=max_length, most_new=1)
        self._sizes = [num_slots]
        while self._sizes[-1] // 2 >= _SMALLEST:
            self._sizes.append(self._sizes[-1] // 2)
        with torch.inference_mode():
            self._slots = Slots(
                model,
                sizes=self._sizes,
                length=max_length,
                num_forced=max_given,
                sampling=sampling,
                stop_ids=stop_ids,
                backend=backend,
            )
            # No slot is active yet, so the trial runs change none. Of these graphs one is replayed at a time.
            pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
            self._running = False
            self._steps = {
                size: recorded(partial(self._slots.step, size), model.device, pool=pool) for size in self._sizes
            }

    @torch.inference_mode()
    def run(self, speakers: Sequence[Speaker]) -> None:
        """Decodes all of them to their ends; what each one says it hears itself.

        Raises:
            InvalidOptionError: a turn does not fit the slots, or a run is under way: a speaker asks for another.
        """
        if self._running:
            raise InvalidOptionError("a run is under way in these slots: let it end, or make an engine for each")
        if not speakers:
            return
        self._running = True
        try:
            self._decode(speakers)
        finally:
            self._running = False

    def _decode(self, speakers: Sequence[Speaker]) -> None:
        run = _Run(self._slots, self._sizes, speakers)
        while run.busy:
            run.looks.begin()
            for _ in range(_WINDOW):
                self._steps[run.size]()
            run.look()


class _Run:
    """One call of :meth:`DecodeEngine.run`: who sits where, who waits, and the looks at the device."""

    def __init__(self, slots: Slots, sizes: Sequence[int], speakers: Sequence[Speaker]) -> None:
        self._slots, self._sizes = slots, sizes
        self._device = slots.control.token_S.device
        self._waiting = deque((speaker, speaker.begin()) for speaker in speakers)
        self._prefix = _common_beginning([turn.given for _, turn in self._waiting])
        self._carried = slots.write_prefix(self._prefix)
        self.size = next(
            (size for size in reversed(sizes) if size >= len(self._waiting)), sizes[0]
        )  # the smallest that holds all
        self._seats = [_Seat() for _ in range(slots.num_slots)]
        self.looks = Looks(self._device)
        for flag in (slots.control.active_S, slots.control.ended_S):
            flag.zero_()
        self._seat_waiting(range(self.size), {})

    @property
    def busy(self) -> bool:
        return any(seat.speaker is not None for seat in self._seats[: self.size])

    def look(self) -> None:
        """Takes a look at the window that was just enqueued, and deals with those that are ready."""
        c = self._slots.control.first(self.size)
        where_S2 = torch.stack([c.ended_S, c.length_S], 1)
        self.looks.take(torch.cat([where_S2.int(), c.history_SL], 1))
        for look in self.looks.ready():
            self._deal_with(look)

    def _deal_with(self, look: Look) -> None:
        """Lets the speakers of ended turns say what follows, and gives free slots to those who wait."""
        ended, length, history = look.values[:, 0], look.values[:, 1], look.values[:, 2:].numpy()
        going_on: dict[int, tuple[int, Turn]] = {}
        free = []
        for slot in ended.nonzero()[:, 0].tolist():
            seat = self._seats[slot]
            if seat.speaker is None or look.number < seat.since:
                continue
            at = int(length[slot])
            following = seat.speaker.hear(history[slot, seat.start : at + 1].tolist())
            if following is None:
                seat.speaker = None
                free.append(slot)
            else:
                going_on[slot] = at, following
        self._seat_waiting(free, going_on)
        if not self._waiting:
            self._shrink()

    def _seat_waiting(self, free: Sequence[int], going_on: dict[int, tuple[int, Turn]]) -> None:
        """Sets slots on the device: those that go on, and the free ones as far as there are sequences waiting."""
        begun: list[int] = []
        turns: list[tuple[int, int, Turn]] = [(slot, at, turn) for slot, (at, turn) in going_on.items()]
        for slot in free:
            if not self._waiting:
                break
            speaker, turn = self._waiting.popleft()
            self._seats[slot].speaker = speaker
            begun.append(slot)
            turns.append((slot, len(self._prefix), Turn(turn.given[len(self._prefix) :], turn.limit)))
        if not turns:
            return
        width = self._slots.control.forced_SF.shape[1]
        forced = np.zeros((len(turns), width), dtype=np.int64)
        rows = np.zeros((len(turns), 6), dtype=np.int64)
        for row, (slot, at, turn) in enumerate(turns):
            given = turn.given
            if len(given) - 1 > width or at + len(given) + turn.limit > self._slots.length:
                raise InvalidOptionError(
                    f"a turn of {len(given)} given and {turn.limit} drawn tokens at position {at} does not fit "
                    f"slots of {self._slots.length} tokens, {width + 1} of them given at once"
                )
            seat = self._seats[slot]
            assert seat.speaker is not None
            seat.start, seat.since = at + len(given), self.looks.number
            forced[row, : len(given) - 1] = given[1:]
            rows[row] = slot, given[0], at, len(given) - 1, turn.limit, seat.speaker.seed
        self._set(rows, forced)
        if begun:
            self._slots.begin(torch.tensor(begun, device=self._device), self._carried)

    def _set(self, rows: NDArray[np.int64], forced: NDArray[np.int64]) -> None:
        c = self._slots.control
        packed = torch.from_numpy(np.concatenate([rows, forced], axis=1))
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        slot, token, at, num_forced, limit, seed = packed[:, :6].unbind(1)
        c.token_S[slot], c.length_S[slot], c.num_forced_S[slot] = token, at, num_forced
        c.budget_S[slot], c.seed_S[slot], c.forced_SF[slot] = limit, seed, packed[:, 6:]
        c.next_forced_S.index_fill_(0, slot, 0)
        c.ended_S.index_fill_(0, slot, False)
        c.active_S.index_fill_(0, slot, True)

    def _shrink(self) -> None:
        """Moves the last sequences together once they fit a smaller batch."""
        taken = [slot for slot, seat in enumerate(self._seats[: self.size]) if seat.speaker is not None]
        size = next((s for s in reversed(self._sizes) if s >= len(taken)), self.size)
        if not taken or size >= self.size:
            return
        sources = [slot for slot in taken if slot >= size]
        targets = [slot for slot in range(size) if self._seats[slot].speaker is None][: len(sources)]
        if sources:
            self._slots.move(*(torch.tensor(slots, device=self._device) for slots in (sources, targets)))
        for source, target in zip(sources, targets, strict=True):
            seat, self._seats[source] = self._seats[source], _Seat()
            seat.since = self.looks.number  # a look that is under way shows it at its old place
            self._seats[target] = seat
        self.size = size


def _common_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens all prompts begin with, without the last of the shortest: something must be left to read."""
    shortest = min(prompts, key=len)
    for place, token in enumerate(shortest[:-1]):
        if any(prompt[place] != token for prompt in prompts):
            return list(shortest[:place])
    return list(shortest[:-1])
