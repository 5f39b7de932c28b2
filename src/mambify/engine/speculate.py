"""Speculative decoding: a draft puts tokens forward, the target reads them all at once, and those that stand stay.

A round is one sequence of kernels and waits for nothing: how many tokens stood, where each slot is, and which slots
have ended are known to the device alone. The host looks every few rounds. What comes out is distributed as the target's
own tokens (:mod:`mambify.ops.accept`).

Letters: S slots, K drafted tokens, T = K + 1 tokens that the target reads, V vocabulary, L places of the history.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mambify.engine.drafting import ModelDraft, model_draft, require_suitable_draft
from mambify.engine.looks import Look, Looks
from mambify.engine.lookup import look_up
from mambify.engine.memory import check_memory, read_bytes
from mambify.engine.pace import MOST_DRAFTED, DraftCount, Pace, draft_counts
from mambify.engine.recording import recorded, seconds_of
from mambify.engine.sampling import Sampling
from mambify.engine.statistics import Statistics
from mambify.engine.tower import Tower
from mambify.errors import InvalidOptionError
from mambify.model import HybridForCausalLM
from mambify.ops.accept import accept_drafts
from mambify.ops.draw import draw_tokens, penalise, uniforms
from mambify.ops.rounds import settle_round
from mambify.trimmed_head import TrimmedHead, columns_of, known_ids

Draft = HybridForCausalLM | Literal["lookup"] | None

_LOOK_EVERY = 4  # rounds; each on a CPU, where looking costs nothing
NUMBERS = 64  # uniform numbers that a round may use: K for the draft, K tests, one last draw
_ENDLESS = 2**40  # tokens


class Speculator:
    """Continues up to ``num_slots`` prompts at a time.

    Args:
        target: whose tokens are wanted; any mix of layers.
        draft: a model of the same vocabulary; ``"lookup"`` takes tokens from the text so far; ``None`` drafts nothing:
            plain decoding.
        num_draft_tokens: K, 1 to 16; without a draft it is 0. A range ``(2, 6)`` or ``"auto"``, which is ``(1, 8)``,
            leaves it to what gives the most tokens a second as the text goes on (:mod:`mambify.engine.pace`).
        max_length: the most tokens of a sequence, prompt included.
        sampling: the distribution that tokens are drawn from, by target and draft alike.
        stop_ids: tokens that end a sequence.
        backend, overlap: of target and draft; see :class:`mambify.engine.tower.Tower`.

    Attributes:
        target: the target's slots.
        draft: the draft's; ``None`` where no model drafts.
        active_S: which slots take part in a round.
        statistics: of the latest run.
        round_seconds: K → what a round takes at the beginning of a text; measured where there is a choice of K, else 0.

    Raises:
        InvalidOptionError: K out of range, a draft of another vocabulary, a target that knows part of it, or more
            sequences than free memory holds.
    """

    def __init__(
        self,
        target: HybridForCausalLM,
        draft: Draft,
        *,
        num_slots: int,
        max_length: int,
        sampling: Sampling,
        num_draft_tokens: DraftCount = 4,
        stop_ids: Sequence[int] = (),
        backend: str = "auto",
        overlap: bool | None = None,
    ) -> None:
        counts = (0,) if draft is None else draft_counts(num_draft_tokens)
        if draft is not None and isinstance(target.lm_head, TrimmedHead):
            raise InvalidOptionError("the target is a draft that knows part of the vocabulary: give a whole model")
        if target.config.draft_features:
            raise InvalidOptionError("the target is a draft that reads another model's hidden states: give that model")
        if isinstance(draft, HybridForCausalLM):
            require_suitable_draft(target.config, draft.config)
        most = counts[-1]
        self.max_length = max_length
        self.sampling = sampling
        device = target.device
        models = [target, draft] if isinstance(draft, HybridForCausalLM) else [target]
        check_memory(models, num_slots=num_slots, length=max_length, most_new=most + 1, penalises=sampling.penalises)
        self._settings = sampling.row_settings(num_slots, device)

        def zeros(*sizes: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(num_slots, *sizes, dtype=dtype, device=device)

        self.active_S = zeros(dtype=torch.bool)
        self._budget_S, self._seed_S, self._heard_S = zeros(), zeros(), zeros()
        #: what a round reads: each slot's token, and those that are put forward
        self._read_ST = zeros(most + 1)
        self._token_S, self._none_S = self._read_ST[:, 0], zeros()
        #: of a round; the likeliest tokens depend on none
        self._number_SN = zeros(2 * most + 1, dtype=torch.float32)
        self.statistics = Statistics()
        # Which tokens occurred, where that matters; kept with the drafted ones by whoever looks beyond them.
        self._seen_SV = zeros(target.config.vocab_size, dtype=torch.bool) if sampling.penalises else None
        self._dismissed: set[int] = set()
        self._run_number = 0  # of the run that the slots belong to
        self._history_SL = zeros(max_length + 1 + MOST_DRAFTED)
        self._accepted_T = torch.zeros(most + 1, dtype=torch.long, device=device)
        self._stops_E = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        self._look_every = 1 if device.type == "cpu" else _LOOK_EVERY
        #: sizes of the parts of what the host is told
        self._told = [num_slots, num_slots, most + 1, num_slots * self._look_every * (most + 1)]
        self._told_X = torch.zeros(sum(self._told), dtype=torch.long, device=device)
        with torch.inference_mode():
            common = {"num_slots": num_slots, "length": max_length, "active_S": self.active_S}
            common |= {"backend": backend, "overlap": overlap}
            self.target = Tower(target, most_new=most + 1, final=draft is None, **common)  # type: ignore[arg-type]
            self.draft: ModelDraft | None = None
            if isinstance(draft, HybridForCausalLM):
                self.draft = model_draft(draft, self.target, self._history_SL, most_new=most + 1, **common)
            self._looks_up = draft == "lookup"
            #: the words that each of them knows, where that is not all
            self._target_ids_W = known_ids(target.lm_head)
            self._draft_ids_W = None if self.draft is None else self.draft.ids_W
            self._draft_columns_V: Tensor | None = None
            if self._draft_ids_W is not None:
                self._draft_columns_V = columns_of(self._draft_ids_W, target.config.vocab_size)
            # No slot is active yet, so the trial runs change none. Of all these graphs one is replayed at a time.
            pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
            self._rounds = {K: recorded(partial(self.step, K), device, pool=pool) for K in counts}
            self._report = recorded(self._tell, device, pool=pool)
            self.round_seconds = self._timed(device) if len(counts) > 1 else dict.fromkeys(counts, 0.0)

    def _timed(self, device: torch.device) -> dict[int, float]:
        """K → what a round takes with every slot at work at the beginning of a text."""
        models = [model for model in (self.target, self.draft) if model is not None]

        def once(step: Callable[[], object]) -> None:
            for model in models:
                model.rewind(1)
            step()

        self.active_S.fill_(True)
        self._budget_S.fill_(_ENDLESS)
        once(next(iter(self._rounds.values())))  # what is made when it is first needed is no part of the time
        found = {K: seconds_of(partial(once, step), device) for K, step in self._rounds.items()}
        self.active_S.zero_()
        return found

    # ---- a round, on the device ------------------------------------------------------------------------------------

    def step(self, K: int) -> None:
        """One round with K drafted tokens, of all active slots. A run replays its recording."""
        if self.sampling.temperature > 0:
            # They depend on a slot's seed and position alone: K for the draft, K tests, one last draw.
            self._number_SN = uniforms(self._seed_S, self.target.length_S, 2 * K + 1, apart=NUMBERS)
        draft_SKW, num_drafted_S = self.put_forward(K)
        read_ST = self._read_ST[:, : K + 1]
        hidden_STD = self.target.stream(read_ST)
        logits_STV = self.target.logits(hidden_STD)
        if self._seen_SV is not None:
            logits_STV = self._penalised(logits_STV, _columns(self._seen_SV, self._target_ids_W), read_ST[:, 1:])
        kept_S, next_S = self._accept(logits_STV, draft_SKW, num_drafted_S)
        count_S, goes_on_S = settle_round(
            read_ST, kept_S, next_S, self._stops_E, self.target.length_S, self.active_S, self._budget_S,
            self._history_SL, self._accepted_T,
        )  # fmt: skip
        if self._seen_SV is not None:
            self._see(read_ST[:, 1:], next_S, count_S)
        if self.draft is not None:
            self.draft.settle(count_S, K, hidden_STD)
        self.target.keep(count_S, K + 1, goes_on_S=goes_on_S)  # the last to ask which slots were active

    def put_forward(self, K: int) -> tuple[Tensor | None, Tensor | None]:
        """The first part of a round: drafts K tokens.

        Returns:
            The logits that they were drawn from, ``[S, K, W]``, ``None`` where that does not matter; and how many there
            are in each slot, ``None`` where all are.
        """
        if self._looks_up:
            drafted_SK, found_S = look_up(self._history_SL, self.target.length_S + 1, K)
            self._read_ST[:, 1 : K + 1] = drafted_SK
            return None, found_S
        if self.draft is None:
            return None, None
        seen_SV = None if self._seen_SV is None else self._seen_SV.clone()
        draft_SKW = None
        for k in range(K):
            found_S1W = self.draft.logits_after(self._read_ST[:, k], k, K)
            if seen_SV is not None:
                seen_SV.scatter_(1, self._read_ST[:, k : k + 1], True)
                found_S1W = self._penalised(found_S1W, _columns(seen_SV, self._draft_ids_W))
            if self.sampling.temperature > 0 and draft_SKW is None:
                draft_SKW = found_S1W.new_empty(len(found_S1W), K, found_S1W.shape[-1])
            draw_tokens(
                found_S1W[:, 0], self._number_SN[:, k], ids_V=self._draft_ids_W, out_S=self._read_ST[:, k + 1],
                copy_SV=None if draft_SKW is None else draft_SKW[:, k], **self._settings,
            )  # fmt: skip
        return draft_SKW, self.draft.num_drafted(K)

    def _accept(
        self, logits_STV: Tensor, draft_SKW: Tensor | None, num_drafted_S: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """How many drafted tokens of each slot stand, and the token after them."""
        K = logits_STV.shape[1] - 1
        if K == 0:
            token_S = draw_tokens(
                logits_STV[:, 0], self._number_SN[:, 0], ids_V=self._target_ids_W, **self._settings
            )  # fmt: skip
            return self._none_S, token_S
        # Of the likeliest tokens it does not matter what they were chosen among.
        return accept_drafts(
            logits_STV, draft_SKW, self._read_ST[:, 1 : K + 1], self._number_SN[:, K : 2 * K + 1], num_drafted_S,
            draft_columns_V=None if draft_SKW is None else self._draft_columns_V, **self._settings,
        )  # fmt: skip

    def _penalised(self, logits_SXV: Tensor, seen_SV: Tensor, following_SF: Tensor | None = None) -> Tensor:
        return penalise(logits_SXV, seen_SV, following_SF, penalty=self.sampling.repetition_penalty)

    def _tell(self) -> None:
        """Puts what the host is to see into one tensor: of each slot how many tokens are new, whether it goes on, and
        the tokens; and the statistics.
        """
        new_W = torch.arange(1, self._told[-1] // len(self._token_S) + 1, device=self._token_S.device)
        place_SW = (self._heard_S[:, None] + new_W).clamp(max=self._history_SL.shape[1] - 1)
        parts = (
            self.target.length_S - self._heard_S, self.active_S, self._accepted_T,
            self._history_SL.gather(1, place_SW).flatten(),
        )  # fmt: skip
        torch.cat([part.long() for part in parts], out=self._told_X)
        self._heard_S.copy_(self.target.length_S)

    def pretend(self, length: int) -> Callable[[], object]:
        """Every slot goes on as if it held ``length`` tokens; returns a round (of the largest K), to measure its cost.

        Rounds may follow each other until the slots are full. A later :meth:`run` begins anew, an earlier one is over.
        """
        self._run_number += 1
        with torch.inference_mode():
            self.target.pretend(length)
            if self.draft is not None:
                self.draft.pretend(length)
            self.active_S.fill_(True)
            self._budget_S.fill_(_ENDLESS)
        return self._rounds[max(self._rounds)]

    def _see(self, drafted_SK: Tensor, next_S: Tensor, count_S: Tensor) -> None:
        """Notes the tokens that stand among those that occurred."""
        assert self._seen_SV is not None
        index_T = torch.arange(drafted_SK.shape[1] + 1, device=next_S.device)
        last_S1 = (count_S - 1).clamp(min=0)[:, None]
        token_ST = torch.cat([drafted_SK, next_S[:, None]], 1).scatter_(1, last_S1, self._token_S[:, None])
        # In place of tokens that do not stand: the last one that does.
        standing_ST = torch.where(index_T < count_S[:, None], token_ST, self._token_S[:, None])
        self._seen_SV.scatter_(1, standing_ST, True)

    # ---- the host --------------------------------------------------------------------------------------------------

    def run(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (number of a prompt, its next tokens) as they come, stop tokens included.

        The slots belong to one run at a time, the latest that was asked for: one before it cannot be heard further.

        Args:
            seeds: one for each prompt; by default those of the sampling settings.

        Raises:
            InvalidOptionError: an empty prompt, one too long for the slots, or a wrong number of seeds; while tokens
                are taken, another run has begun meanwhile.
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
        self._run_number += 1
        numbered = [_Prompt(n, ids, seed) for n, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))]
        return self._continue(numbered, max_new_tokens, self._run_number)

    @torch.inference_mode()
    def _continue(
        self, prompts: Sequence[_Prompt], max_new_tokens: int, run_number: int
    ) -> Iterator[tuple[int, list[int]]]:
        self._require_present(run_number)
        waiting = deque(prompts)
        seats: list[_Seat | None] = [None] * len(self._token_S)
        self.active_S.zero_()  # a run that was not heard to its end
        self._accepted_T.zero_()
        self.statistics = Statistics()
        self._dismissed.clear()
        self.target.refresh()  # weights may have changed since the last run
        if self.draft is not None:
            self.draft.tower.refresh()
        looks, pace = Looks(self._told_X.device), Pace(self.round_seconds)
        counted = [0] * len(self._accepted_T)
        under_way: deque[int] = deque()  # K of every look that was not dealt with
        while waiting or any(seats):
            free = [slot for slot, seat in enumerate(seats) if seat is None][: len(waiting)]
            begun = {slot: waiting.popleft() for slot in free}
            self._begin(begun, max_new_tokens)
            for slot, newcomer in begun.items():
                seats[slot] = _Seat(newcomer.number, since=looks.number)
            under_way.append(pace.choose())
            looks.begin()
            for _ in range(self._look_every):
                self._rounds[under_way[-1]]()
            self._report()
            looks.take(self._told_X)
            for look in looks.ready():
                K, before = under_way.popleft(), counted
                counted = look.values.split(self._told)[2].tolist()
                accepted = [now - then for now, then in zip(counted, before, strict=True)]
                # Now: whoever meets a stop token listens no further.
                self.statistics.add(K, accepted, passes=self._look_every, seconds=look.seconds)
                pace.observe(K, accepted, look.seconds / self._look_every)
                for piece in self._hear(look, seats):
                    yield piece
                    if waiting or any(seats):
                        self._require_present(run_number)
                    elif run_number != self._run_number:
                        return  # it was heard to its end: what is left of the looks is empty

    def _require_present(self, run_number: int) -> None:
        if run_number != self._run_number:
            raise InvalidOptionError(
                "another run has begun in the slots of this one: hear each to its end, or make a decoder for each"
            )

    def _hear(self, look: Look, seats: list[_Seat | None]) -> Iterator[tuple[int, list[int]]]:
        """Gives out what a look found, and frees the seats of sequences that have ended."""
        counts, active, _, tokens = look.values.split(self._told)
        given = zip(counts.tolist(), active.tolist(), tokens.view(len(seats), -1).tolist(), strict=True)
        for slot, (count, goes_on, new) in enumerate(given):
            seat = seats[slot]
            if seat is None or look.number < seat.since:
                continue
            self.statistics.tokens += count
            if not goes_on:
                seats[slot] = None
            if count:
                yield seat.number, new[:count]
            if seat.number in self._dismissed and goes_on:
                self.active_S[slot] = False
                seats[slot] = None

    @property
    def device(self) -> torch.device:
        """Where it decodes."""
        return self.active_S.device

    def read_bytes(self, length: int, num_drafted: int) -> int:
        """Bytes that a round with this K must read: weights and what layers carry, ``length`` tokens a slot; a draft
        reads K times.
        """
        found = read_bytes(self.target.model, num_slots=len(self._token_S), length=length)
        if self.draft is not None:
            found += num_drafted * read_bytes(self.draft.tower.model, num_slots=len(self._token_S), length=length)
        return found

    def dismiss(self, number: int) -> None:
        """Ends a prompt of the present run before its time: to be called between two pieces of :meth:`run`."""
        self._dismissed.add(number)

    def _begin(self, begun: Mapping[int, _Prompt], budget: int) -> None:
        """Reads prompts, all but their last tokens, into slots that are free."""
        if not begun:
            return
        width = max(len(prompt.ids) for prompt in begun.values())
        rows = [
            [slot, ids[-1], budget, seed, len(ids) - 1, *ids, *[ids[-1]] * (width - len(ids))]
            for slot, (_, ids, seed) in begun.items()
        ]
        packed = torch.tensor(rows)
        if self._token_S.device.type == "cuda":
            packed = packed.pin_memory().to(self._token_S.device, non_blocking=True)
        slot_E, token_E, budget_E, seed_E, heard_E = packed[:, :5].unbind(1)
        prompts = [prompt.ids for prompt in begun.values()]
        if self.draft is None:
            self.target.begin(list(begun), [ids[:-1] for ids in prompts])
        else:
            self.draft.begin(list(begun), prompts)
        self._token_S[slot_E], self._budget_S[slot_E], self._seed_S[slot_E] = token_E, budget_E, seed_E
        self._heard_S[slot_E] = heard_E
        self._history_SL[slot_E, :width] = packed[:, 5:]
        if self._seen_SV is not None:
            self._seen_SV.index_fill_(0, slot_E, False)
            self._seen_SV[slot_E[:, None], packed[:, 5:]] = True
        self.active_S.index_fill_(0, slot_E, True)


def _columns(seen_SV: Tensor, ids_W: Tensor | None) -> Tensor:
    return seen_SV if ids_W is None else seen_SV[:, ids_W]


class _Prompt(NamedTuple):
    number: int
    ids: Sequence[int]
    seed: int


@dataclass
class _Seat:
    """Which prompt sits in a slot, and the first look that shows it there."""

    number: int
    since: int
