"""Speculative decoding: a draft puts tokens forward, the target reads them all at once, and those that stand stay.

A round is one sequence of kernels and waits for nothing: how many tokens stood, where each slot is, and which slots
have ended are known to the device alone. The host looks every few rounds. What comes out is distributed as the target's
own tokens (:mod:`mambify.ops.accept`).

Letters: S slots, K drafted tokens, T = K + 1 tokens that the target reads, V vocabulary, L places of the history.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mambify.config import HybridConfig
from mambify.engine.lookup import look_up
from mambify.engine.memory import check_memory, read_bytes
from mambify.engine.recording import recorded
from mambify.engine.sampling import Sampling
from mambify.engine.tower import Tower
from mambify.errors import InvalidOptionError
from mambify.model import HybridForCausalLM
from mambify.ops.accept import accept_drafts
from mambify.ops.draw import draw_tokens, penalise, uniform

Draft = HybridForCausalLM | Literal["lookup"] | None

_LOOK_EVERY = 4  # rounds; each on a CPU, where looking costs nothing
NUMBERS = 64  # uniform numbers that a round may use: K for the draft, K tests, one last draw
MOST_DRAFTED = 16


@dataclass
class Statistics:
    """What a run did.

    Attributes:
        tokens: given out in all.
        rounds: passes of the target, whatever number of slots took part in each.
        seconds: spent on them, the host's looks included and the reading of prompts not.
        accepted: in how many rounds of a slot 0, 1, … K drafted tokens were accepted.
    """

    tokens: int = 0
    rounds: int = 0
    seconds: float = 0.0
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_per_round(self) -> float:
        """Of one slot."""
        return self.tokens / max(sum(self.accepted), 1)

    @property
    def acceptance_by_position(self) -> list[float]:
        """Of the rounds that kept all drafted tokens before it, the share that kept the k-th as well."""
        reached = [sum(self.accepted[k:]) for k in range(len(self.accepted))]
        return [after / before if before else 0.0 for before, after in itertools.pairwise(reached)]


class Speculator:
    """Continues up to ``num_slots`` prompts at a time.

    Args:
        target: whose tokens are wanted; any mix of layers.
        draft: a model of the same vocabulary; ``"lookup"`` takes tokens from the text so far; ``None`` drafts nothing:
            plain decoding.
        num_draft_tokens: K, 1 to 16; without a draft it is 0.
        max_length: the most tokens of a sequence, prompt included.
        sampling: the distribution that tokens are drawn from, by target and draft alike.
        stop_ids: tokens that end a sequence.

    Raises:
        InvalidOptionError: K out of range, a draft of another vocabulary, or more sequences than free memory holds.
    """

    def __init__(
        self,
        target: HybridForCausalLM,
        draft: Draft,
        *,
        num_slots: int,
        max_length: int,
        sampling: Sampling,
        num_draft_tokens: int = 4,
        stop_ids: Sequence[int] = (),
    ) -> None:
        if draft is not None:
            require_drafted(num_draft_tokens)
        if isinstance(draft, HybridForCausalLM):
            require_same_vocabulary(target.config, draft.config)
        self.K = 0 if draft is None else num_draft_tokens
        self.max_length = max_length
        self.sampling, self._settings = sampling, sampling.settings()
        device = target.device
        models = [target, draft] if isinstance(draft, HybridForCausalLM) else [target]
        check_memory(models, num_slots=num_slots, length=max_length, most_new=self.K + 1, penalises=sampling.penalises)

        def zeros(*sizes: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(num_slots, *sizes, dtype=dtype, device=device)

        self._active_S = zeros(dtype=torch.bool)
        self._token_S, self._budget_S, self._seed_S = zeros(), zeros(), zeros()
        self.statistics = Statistics()
        # Which tokens occurred, where that matters; kept with the drafted ones by whoever looks beyond them.
        self._seen_SV = zeros(target.config.vocab_size, dtype=torch.bool) if sampling.penalises else None
        self._dismissed: set[int] = set()
        self._history_SL = zeros(max_length + 1 + MOST_DRAFTED)
        self._accepted_T = torch.zeros(self.K + 1, dtype=torch.long, device=device)
        self._stops_E = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        with torch.inference_mode():
            common = {"num_slots": num_slots, "length": max_length, "active_S": self._active_S}
            self._target = Tower(target, most_new=self.K + 1, **common)  # type: ignore[arg-type]
            self._draft: Tower | None = None
            if isinstance(draft, HybridForCausalLM):
                self._draft = Tower(draft, most_new=self.K + 1, **common)  # type: ignore[arg-type]
            self._looks_up = draft == "lookup"
            self._round = recorded(self._step, device)  # no slot is active yet, so the trial runs change none

    # ---- a round, on the device ------------------------------------------------------------------------------------

    def _step(self) -> None:
        drafted_SK, draft_SKV, num_drafted_S = self._put_forward()
        logits_STV = self._target.read(torch.cat([self._token_S[:, None], drafted_SK], 1))
        assert logits_STV is not None
        if self._seen_SV is not None:
            logits_STV = self._penalised(logits_STV, self._seen_SV, drafted_SK)
        kept_S, next_S = accept_drafts(
            logits_STV, draft_SKV, drafted_SK, self._numbers(self.K, self.K + 1), num_drafted_S, **self._settings
        )
        token_ST = torch.cat([drafted_SK, next_S[:, None]], 1).scatter_(1, kept_S[:, None], next_S[:, None])
        count_S, ends_S = self._standing(token_ST, kept_S)
        self._write_down(token_ST, count_S, kept_S)
        self._target.keep(count_S, self.K + 1)
        if self._draft is not None:
            self._draft.take_back(self.K + 1 - count_S)
        self._active_S &= ~ends_S

    def _put_forward(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Drafted tokens ``[S, K]``, the logits they were drawn from, and how many there are in each slot."""
        if self._looks_up:
            drafted_SK, found_S = look_up(self._history_SL, self._target.length_S + 1, self.K)
            return drafted_SK, None, found_S
        if self._draft is None:
            return self._token_S.new_zeros(len(self._token_S), 0), None, None
        one_S, numbers_SK = torch.ones_like(self._token_S), self._numbers(0, self.K)
        tokens, logits = [self._token_S], []
        seen_SV = None if self._seen_SV is None else self._seen_SV.clone()
        for k in range(self.K + 1):  # the last drafted token is read as well: nothing is missing if all of them stand
            found_S1V = self._draft.read(tokens[k][:, None], fold=k == 0, logits=k < self.K)
            self._draft.keep(one_S, 1, fold=k == 0)
            if found_S1V is not None:
                if seen_SV is not None:
                    found_S1V = self._penalised(found_S1V, seen_SV.scatter_(1, tokens[k][:, None], True))
                logits.append(found_S1V[:, 0])
                tokens.append(draw_tokens(logits[k], numbers_SK[:, k].contiguous(), **self._settings))
        return torch.stack(tokens[1:], 1), torch.stack(logits, 1), None

    def _penalised(self, logits_SXV: Tensor, seen_SV: Tensor, following_SF: Tensor | None = None) -> Tensor:
        return penalise(logits_SXV, seen_SV, following_SF, penalty=self.sampling.repetition_penalty)

    def _numbers(self, first: int, count: int) -> Tensor:
        """Uniform numbers ``[S, count]`` of this round: they depend on the slot's seed and position alone."""
        number = first + torch.arange(count, device=self._seed_S.device)
        return uniform(self._seed_S[:, None], self._target.length_S[:, None] * NUMBERS + number)

    def _standing(self, token_ST: Tensor, kept_S: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the round's tokens stand in active slots, and which slots end with them."""
        T = self.K + 1
        index_T = torch.arange(T, device=kept_S.device)
        stops_ST = (token_ST[..., None] == self._stops_E).any(-1) & (index_T <= kept_S[:, None])
        stop_S = torch.where(stops_ST.any(1), stops_ST.int().argmax(1), T)
        count_S = torch.minimum(torch.minimum(kept_S, stop_S) + 1, self._budget_S)
        ends_S = (count_S > stop_S) | (count_S == self._budget_S)
        return torch.where(self._active_S, count_S, 0), self._active_S & ends_S

    def _write_down(self, token_ST: Tensor, count_S: Tensor, kept_S: Tensor) -> None:
        """Puts the tokens that stand into the history; the last of them is the next to be read."""
        index_T = torch.arange(self.K + 1, device=kept_S.device)
        place_ST = self._target.length_S[:, None] + 1 + index_T
        nowhere = self._history_SL.shape[1] - 1
        place_ST = torch.where(index_T < count_S[:, None], place_ST, nowhere)
        self._history_SL.scatter_(1, place_ST, token_ST)
        if self._seen_SV is not None:  # in place of tokens that do not stand: one that occurred anyway
            standing_ST = torch.where(index_T < count_S[:, None], token_ST, self._token_S[:, None])
            self._seen_SV.scatter_(1, standing_ST, True)
        last_S = token_ST.gather(1, (count_S - 1).clamp(min=0)[:, None])[:, 0]
        self._token_S.copy_(torch.where(self._active_S, last_S, self._token_S))
        self._budget_S -= count_S
        self._accepted_T.index_add_(0, kept_S, self._active_S.long())

    # ---- the host --------------------------------------------------------------------------------------------------

    def run(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (number of a prompt, its next tokens) as they come, stop tokens included.

        Args:
            seeds: one for each prompt; by default those of the sampling settings.

        Raises:
            InvalidOptionError: an empty prompt, one too long for the slots, or a wrong number of seeds.
        """
        for prompt in prompts:
            if not len(prompt):
                raise InvalidOptionError("the prompt is empty")
            if len(prompt) + max_new_tokens > self.max_length:
                raise InvalidOptionError(
                    f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit slots of "
                    f"{self.max_length} tokens"
                )
        seeds = self.sampling.seeds(len(prompts)) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise InvalidOptionError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each")
        return self._rounds(prompts, max_new_tokens, seeds)

    @torch.inference_mode()
    def _rounds(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int]
    ) -> Iterator[tuple[int, list[int]]]:
        look_every = 1 if self._active_S.device.type == "cpu" else _LOOK_EVERY
        waiting = deque((_Seat(number, len(prompt)), prompt) for number, prompt in enumerate(prompts))
        seats: list[_Seat | None] = [None] * len(self._token_S)
        self._active_S.zero_()  # a run that was not heard to its end
        self._accepted_T.zero_()
        self.statistics = Statistics()
        self._dismissed.clear()
        while waiting or any(seats):
            free = [slot for slot, seat in enumerate(seats) if seat is None][: len(waiting)]
            seated = [waiting.popleft() for _ in free]
            if free:
                self._begin(
                    free, [prompt for _, prompt in seated], max_new_tokens, [seeds[s.number] for s, _ in seated]
                )
            for slot, (newcomer, _) in zip(free, seated, strict=True):
                seats[slot] = newcomer
            start = time.perf_counter()
            for _ in range(look_every):
                self._round()
            ends = self._target.length_S.tolist()
            active = self._active_S.tolist()
            self.statistics.rounds += look_every
            self.statistics.seconds += time.perf_counter() - start
            self.statistics.accepted = self._accepted_T.tolist()  # now: whoever meets a stop token listens no further
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
                if seat.number in self._dismissed and active[slot]:
                    self._active_S[slot] = False
                    seats[slot] = None

    @property
    def device(self) -> torch.device:
        """Where it decodes."""
        return self._active_S.device

    def read_bytes(self, length: int) -> int:
        """Bytes that a round must read: weights and what layers carry, ``length`` tokens a slot; a draft reads K + 1
        times.
        """
        found = read_bytes(self._target.model, num_slots=len(self._token_S), length=length)
        if self._draft is not None:
            found += (self.K + 1) * read_bytes(self._draft.model, num_slots=len(self._token_S), length=length)
        return found

    def dismiss(self, number: int) -> None:
        """Ends a prompt of the present run before its time: to be called between two pieces of :meth:`run`."""
        self._dismissed.add(number)

    def _begin(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], budget: int, seeds: Sequence[int]) -> None:
        """Reads prompts, all but their last tokens, into slots that are free."""
        for tower in (self._target, self._draft):
            if tower is not None:
                tower.begin(slots, [prompt[:-1] for prompt in prompts])
        for slot, prompt, seed in zip(slots, prompts, seeds, strict=True):
            given = torch.tensor(list(prompt), device=self._history_SL.device)
            self._history_SL[slot, : len(prompt)] = given
            if self._seen_SV is not None:
                self._seen_SV[slot] = False
                self._seen_SV[slot, given] = True
            self._token_S[slot], self._budget_S[slot], self._seed_S[slot] = prompt[-1], budget, seed
            self._active_S[slot] = True


def require_drafted(num_draft_tokens: int) -> None:
    """Raises InvalidOptionError unless a round can put forward so many tokens."""
    if not 1 <= num_draft_tokens <= MOST_DRAFTED:
        raise InvalidOptionError(f"num_draft_tokens must be 1 to {MOST_DRAFTED}, not {num_draft_tokens}")


def require_same_vocabulary(target: HybridConfig, draft: HybridConfig) -> None:
    """Raises InvalidOptionError unless both models have as many tokens."""
    if draft.vocab_size != target.vocab_size:
        raise InvalidOptionError(
            f"the draft has a vocabulary of {draft.vocab_size} tokens and the target one of {target.vocab_size}: give "
            "a draft of the same vocabulary"
        )


@dataclass
class _Seat:
    """Which prompt sits in a slot, and up to which position its tokens have been given out."""

    number: int
    heard: int
