"""Speculative decoding: a draft puts tokens forward, the target reads them all at once, and those that stand stay.

A round is one sequence of kernels and waits for nothing: how many tokens stood, where each slot is, and which slots
have ended are known to the device alone. The host looks every few rounds. What comes out is distributed as the target's
own tokens (:mod:`mambify.ops.accept`).

Letters: S slots, K drafted tokens, T = K + 1 tokens that the target reads, V vocabulary, L places of the history.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mambify.engine.lookup import look_up
from mambify.engine.pace import MOST_DRAFTED, Pace, draft_counts
from mambify.engine.recording import recorded
from mambify.engine.slots import Drawing
from mambify.engine.tower import Tower
from mambify.errors import InvalidOptionError
from mambify.model import HybridForCausalLM
from mambify.ops.accept import accept_drafts
from mambify.ops.draw import draw_tokens, uniform
from mambify.trimmed_head import TrimmedHead

Draft = HybridForCausalLM | Literal["lookup"] | None

_LOOK_EVERY = 4  # rounds
_NUMBERS = 64  # uniform numbers that a round may use: K for the draft, K tests, one last draw


@dataclass
class Statistics:
    """What a run did.

    Attributes:
        tokens: given out in all.
        accepted: in how many rounds of a slot 0, 1, … K drafted tokens were accepted.
        whole: in how many of these that was all that the round drafted.
        rounds: K → how many rounds of a slot drafted K tokens.
    """

    tokens: int = 0
    accepted: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    rounds: dict[int, int] = field(default_factory=dict)

    def add(self, num_drafted: int, accepted: Sequence[int]) -> None:
        """Counts rounds with this K, of which ``accepted`` says how many kept 0, 1, … tokens."""
        missing = len(accepted) - len(self.accepted)
        self.accepted, self.whole = self.accepted + [0] * missing, self.whole + [0] * missing
        self.accepted = [a + b for a, b in zip(self.accepted, accepted, strict=True)]
        self.whole[num_drafted] += accepted[num_drafted]
        self.rounds[num_drafted] = self.rounds.get(num_drafted, 0) + sum(accepted)

    @property
    def tokens_per_round(self) -> float:
        """Of one slot."""
        return self.tokens / max(sum(self.accepted), 1)

    @property
    def acceptance_by_position(self) -> list[float]:
        """Of the rounds that drafted k tokens and kept all before the k-th, the share that kept it as well."""
        shares = []
        for k in range(1, len(self.accepted)):
            tried, kept = sum(self.accepted[k - 1 :]) - self.whole[k - 1], sum(self.accepted[k:])
            shares.append(kept / tried if tried else 0.0)
        return shares


class Speculator:
    """Continues up to ``num_slots`` prompts at a time.

    Args:
        target: whose tokens are wanted; any mix of layers.
        draft: a model of the same vocabulary; ``"lookup"`` takes tokens from the text so far; ``None`` drafts nothing:
            plain decoding.
        num_draft_tokens: K, 1 to 16; without a draft it is 0. A range ``(2, 6)`` or ``"auto"``, which is ``(1, 8)``,
            leaves it to what gives the most tokens a second as the text goes on (:mod:`mambify.engine.pace`).
        max_length: the most tokens of a sequence, prompt included.
        drawing: the distribution that tokens are drawn from, by target and draft alike.
        stop_ids: tokens that end a sequence.

    Raises:
        InvalidOptionError: K out of range, or a draft of another vocabulary.
    """

    def __init__(
        self,
        target: HybridForCausalLM,
        draft: Draft,
        *,
        num_slots: int,
        max_length: int,
        drawing: Drawing,
        num_draft_tokens: int | tuple[int, int] | str = 4,
        stop_ids: Sequence[int] = (),
    ) -> None:
        counts = (0,) if draft is None else draft_counts(num_draft_tokens)
        if target.config.draft_vocabulary is not None:
            raise InvalidOptionError("the target is a draft that knows part of the vocabulary: give a whole model")
        if isinstance(draft, HybridForCausalLM) and draft.config.vocab_size != target.config.vocab_size:
            raise InvalidOptionError(
                f"the draft has a vocabulary of {draft.config.vocab_size} tokens and the target one of "
                f"{target.config.vocab_size}: give a draft of the same vocabulary"
            )
        most = counts[-1]
        self.max_length = max_length
        self._settings = drawing.settings()
        device = target.device

        def zeros(*sizes: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(num_slots, *sizes, dtype=dtype, device=device)

        self._active_S = zeros(dtype=torch.bool)
        self._token_S, self._budget_S, self._seed_S = zeros(), zeros(), zeros()
        self.statistics = Statistics()
        self._history_SL = zeros(max_length + 1 + MOST_DRAFTED)
        self._accepted_T = torch.zeros(most + 1, dtype=torch.long, device=device)
        self._stops_E = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        with torch.inference_mode():
            common = {"num_slots": num_slots, "length": max_length, "active_S": self._active_S}
            self._target = Tower(target, most_new=most + 1, **common)  # type: ignore[arg-type]
            self._draft: Tower | None = None
            self._draft_ids_W: Tensor | None = None
            if isinstance(draft, HybridForCausalLM):
                self._draft = Tower(draft, most_new=most + 1, **common)  # type: ignore[arg-type]
                head = draft.lm_head
                self._draft_ids_W = head.token_ids if isinstance(head, TrimmedHead) else None
            self._looks_up = draft == "lookup"
            # No slot is active yet, so the trial runs change none.
            pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
            self._rounds = {K: recorded(partial(self._step, K), device, pool=pool) for K in counts}
            self._seconds = {K: _seconds(step, device) if len(counts) > 1 else 0.0 for K, step in self._rounds.items()}

    # ---- a round, on the device ------------------------------------------------------------------------------------

    def _step(self, K: int) -> None:
        drafted_SK, draft_SKW, num_drafted_S = self._put_forward(K)
        logits_STV = self._target.read(torch.cat([self._token_S[:, None], drafted_SK], 1))
        assert logits_STV is not None
        kept_S, next_S = accept_drafts(
            logits_STV, draft_SKW, drafted_SK, self._numbers(K, K + 1), num_drafted_S,
            draft_ids_W=self._draft_ids_W, **self._settings,
        )  # fmt: skip
        token_ST = torch.cat([drafted_SK, next_S[:, None]], 1).scatter_(1, kept_S[:, None], next_S[:, None])
        count_S, ends_S = self._standing(token_ST, kept_S)
        self._write_down(token_ST, count_S, kept_S)
        self._target.keep(count_S, K + 1)
        if self._draft is not None:
            self._draft.take_back(K + 1 - count_S)
        self._active_S &= ~ends_S

    def _put_forward(self, K: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Drafted tokens ``[S, K]``, the logits they were drawn from, and how many there are in each slot."""
        if self._looks_up:
            drafted_SK, found_S = look_up(self._history_SL, self._target.length_S + 1, K)
            return drafted_SK, None, found_S
        if self._draft is None:
            return self._token_S.new_zeros(len(self._token_S), 0), None, None
        one_S, numbers_SK = torch.ones_like(self._token_S), self._numbers(0, K)
        tokens, logits = [self._token_S], []
        for k in range(K + 1):  # the last drafted token is read as well: nothing is missing if all of them stand
            found_S1W = self._draft.read(tokens[k][:, None], fold=k == 0, logits=k < K)
            self._draft.keep(one_S, 1, fold=k == 0)
            if found_S1W is not None:
                logits.append(found_S1W[:, 0])
                drawn_S = draw_tokens(logits[k], numbers_SK[:, k].contiguous(), **self._settings)
                tokens.append(drawn_S if self._draft_ids_W is None else self._draft_ids_W[drawn_S])
        return torch.stack(tokens[1:], 1), torch.stack(logits, 1), None

    def _numbers(self, first: int, count: int) -> Tensor:
        """Uniform numbers ``[S, count]`` of this round: they depend on the slot's seed and position alone."""
        number = first + torch.arange(count, device=self._seed_S.device)
        return uniform(self._seed_S[:, None], self._target.length_S[:, None] * _NUMBERS + number)

    def _standing(self, token_ST: Tensor, kept_S: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the round's tokens stand in active slots, and which slots end with them."""
        T = token_ST.shape[1]
        index_T = torch.arange(T, device=kept_S.device)
        stops_ST = (token_ST[..., None] == self._stops_E).any(-1) & (index_T <= kept_S[:, None])
        stop_S = torch.where(stops_ST.any(1), stops_ST.int().argmax(1), T)
        count_S = torch.minimum(torch.minimum(kept_S, stop_S) + 1, self._budget_S)
        ends_S = (count_S > stop_S) | (count_S == self._budget_S)
        return torch.where(self._active_S, count_S, 0), self._active_S & ends_S

    def _write_down(self, token_ST: Tensor, count_S: Tensor, kept_S: Tensor) -> None:
        """Puts the tokens that stand into the history; the last of them is the next to be read."""
        index_T = torch.arange(token_ST.shape[1], device=kept_S.device)
        place_ST = self._target.length_S[:, None] + 1 + index_T
        nowhere = self._history_SL.shape[1] - 1
        place_ST = torch.where(index_T < count_S[:, None], place_ST, nowhere)
        self._history_SL.scatter_(1, place_ST, token_ST)
        last_S = token_ST.gather(1, (count_S - 1).clamp(min=0)[:, None])[:, 0]
        self._token_S.copy_(torch.where(self._active_S, last_S, self._token_S))
        self._budget_S -= count_S
        self._accepted_T.index_add_(0, kept_S, self._active_S.long())

    # ---- the host --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (number of a prompt, its next tokens) as they come, stop tokens included.

        Args:
            seeds: one for each prompt; the prompt's number by default.

        Raises:
            InvalidOptionError: an empty prompt, or one too long for the slots.
        """
        for prompt in prompts:
            if not prompt:
                raise InvalidOptionError("the prompt is empty")
            if len(prompt) + max_new_tokens > self.max_length:
                raise InvalidOptionError(
                    f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit slots of "
                    f"{self.max_length} tokens"
                )
        waiting = deque(enumerate(prompts))
        seats: list[_Seat | None] = [None] * len(self._token_S)
        self._active_S.zero_()  # a run that was not heard to its end
        self._accepted_T.zero_()
        self.statistics = Statistics()
        pace, counted = Pace(self._seconds), [0] * len(self._accepted_T)
        while waiting or any(seats):
            undisturbed = True
            for slot, seat in enumerate(seats):
                if seat is None and waiting:
                    number, prompt = waiting.popleft()
                    self._begin(slot, prompt, max_new_tokens, number if seeds is None else seeds[number])
                    seats[slot] = _Seat(number, len(prompt))
                    undisturbed = False
            K, start = pace.choose(), time.perf_counter()
            for _ in range(_LOOK_EVERY):
                self._rounds[K]()
            ends = self._target.length_S.tolist()
            seconds = (time.perf_counter() - start) / _LOOK_EVERY
            active = self._active_S.tolist()
            before, counted = counted, self._accepted_T.tolist()
            new = [now - then for now, then in zip(counted, before, strict=True)]
            self.statistics.add(K, new)  # now: whoever meets a stop token listens no further
            pace.observe(K, new, seconds if undisturbed else None)
            for slot, seat in enumerate(seats):
                if seat is None:
                    continue
                given = self._history_SL[slot, seat.heard : ends[slot] + 1].tolist()
                seat.heard += len(given)
                self.statistics.tokens += len(given)
                if not active[slot]:
                    seats[slot] = None
                if given:
                    yield seat.number, given

    def _begin(self, slot: int, prompt: Sequence[int], budget: int, seed: int) -> None:
        for tower in (self._target, self._draft):
            if tower is not None:
                tower.begin(slot, prompt[:-1])
        self._history_SL[slot, : len(prompt)] = torch.tensor(list(prompt), device=self._history_SL.device)
        self._token_S[slot], self._budget_S[slot], self._seed_S[slot] = prompt[-1], budget, seed
        self._active_S[slot] = True


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """What a round takes."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(_LOOK_EVERY):
        step()
    last.record()
    last.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1000 / _LOOK_EVERY


@dataclass
class _Seat:
    """Which prompt sits in a slot, and up to which position its tokens have been given out."""

    number: int
    heard: int
