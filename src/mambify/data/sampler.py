"""Drawing documents from a teacher: conversations through its template, or plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mambify.data.chat import ChatFormat, Message, chat_format, decode, document_end, document_start
from mambify.data.documents import DEFAULT_HELDOUT, Document, Kind, conversation_document, document_id
from mambify.data.questions import Question, Questions
from mambify.data.sample import sample_continuations
from mambify.engine import DecodeEngine, Sampling, Turn
from mambify.errors import InvalidOptionError, UnsupportedError, did_you_mean
from mambify.language_model import evaluating, position_limit, stop_ids
from mambify.model import HybridForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("auto", "chat", "text", "mixed")


@dataclass(frozen=True)
class Settings:
    """All that decides the bytes of a synthesized directory, teacher and tokenizer aside."""

    num_tokens: int
    kind: str = "auto"
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    max_user_tokens: int = 128
    turns: int = 1
    batch_size: int = 64
    documents_per_shard: int = 512
    heldout: float = DEFAULT_HELDOUT

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidOptionError(f"unknown kind {self.kind!r}: {did_you_mean(self.kind, KINDS)}")
        for name in (
            "num_tokens", "max_new_tokens", "max_user_tokens", "turns", "batch_size", "documents_per_shard",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InvalidOptionError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.temperature > 0.0:
            raise InvalidOptionError(f"temperature must be above 0, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidOptionError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise InvalidOptionError(f"top_k must be at least 0, not {self.top_k}")
        if not 0.0 <= self.heldout < 1.0:
            raise InvalidOptionError(f"heldout must be at least 0 and below 1, not {self.heldout}")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of text that take turns in a shard."""
        kinds: dict[str, tuple[Kind, ...]] = {"chat": ("chat",), "text": ("text",), "mixed": ("chat", "text")}
        return kinds[self.kind]


class Sampler:
    """Draws documents of one kind: on a GPU through the decode engine's slots, elsewhere a batch at a time.

    Args:
        prompts: those that :meth:`answer` will be asked to go on from, for their lengths.
        questions: what users say in conversations; by default the model writes that too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        *,
        prompts: Sequence[Sequence[int]] = (),
        questions: Questions | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.questions = model, tokenizer, settings, questions
        asked = () if questions is None else questions.questions
        self.longest_prompt = max([*map(len, prompts), *(question.longest for question in asked)], default=0)
        self.device = torch.device(model.device)
        self.format: ChatFormat | None = chat_format(tokenizer) if "chat" in settings.kinds else None
        self.start = document_start(tokenizer)
        if "text" in settings.kinds and self.start is None and not prompts:
            raise UnsupportedError("this tokenizer has no token that begins a document: use --kind chat")
        self.stops = _stop_ids(model, tokenizer) | (
            set() if self.format is None else {self.format.user_end, self.format.answer_end}
        )
        self.longest = self._longest()
        limit = position_limit(model.config)
        if limit is not None and self.longest > limit:
            raise InvalidOptionError(
                f"documents of up to {self.longest} tokens do not fit the teacher's {limit} positions: "
                "lower max_new_tokens, max_user_tokens or turns"
            )
        self.in_slots = self.device.type == "cuda" and isinstance(model, HybridForCausalLM)

    @cached_property
    def engine(self) -> DecodeEngine:
        """Slots for ``batch_size`` documents of any length these settings allow."""
        assert isinstance(self.model, HybridForCausalLM)
        form, s = self.format, self.settings
        given = [] if form is None else [form.before_user, form.before_answer, form.before_next_user]
        with evaluating(self.model):
            return DecodeEngine(
                self.model,
                num_slots=s.batch_size,
                max_length=self.longest + 1,
                max_given=max([self.longest_prompt, *map(len, given)], default=1),
                sampling=Sampling(s.temperature, s.top_k, s.top_p),
                stop_ids=sorted(self.stops),
            )

    @property
    def at_once(self) -> int | None:
        """The most rows that :meth:`sample` should be asked for; slots are refilled as documents end, so any number."""
        return None if self.in_slots else self.settings.batch_size

    def facts(self) -> dict[str, Any]:
        """What the tokenizer's conventions, and the way of sampling, contribute to the bytes."""
        return {
            "stops": sorted(self.stops),
            "document_start": self.start,
            "chat_format": None if self.format is None else _plain(self.format),
            "sampled_in": "slots" if self.in_slots else "batches",
            **({} if self.questions is None else {"questions": self.questions.fingerprint}),
        }

    def asked(self, start: int) -> Iterator[Question] | None:
        """The questions from place ``start`` of their endless order on; ``None`` where the model asks them itself."""
        return None if self.questions is None else self.questions.in_turn(seed=self.settings.seed, start=start)

    def sample(
        self,
        kind: Kind,
        rows: int,
        progress: Callable[[int], None] | None = None,
        *,
        asked: Iterator[Question] | None = None,
    ) -> list[Document]:
        """Up to ``rows`` documents (empty ones are dropped), in a fixed order.

        Args:
            progress: hears of the tokens of each.
            asked: where the next questions come from (:meth:`asked`).
        """
        if asked is not None:
            return self._write([_Interview(self, progress, next(asked)) for _ in range(rows)])
        return self._write([self._writer(kind, progress) for _ in range(rows)])

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[Document]:
        """A document for each prompt, which goes on from it; those to which nothing is said are dropped."""
        return self._write([_Answer(self, prompt) for prompt in prompts])

    def _write(self, writers: Sequence[_Writer]) -> list[Document]:
        with evaluating(self.model):
            if self.in_slots:
                seeds = torch.randint(2**62, (len(writers),)).tolist()
                for writer, seed in zip(writers, seeds, strict=True):
                    writer.seed = seed
                self.engine.run(writers)
            else:
                self._run_in_batches(writers)
        return [writer.document for writer in writers if writer.document is not None]

    def _writer(self, kind: Kind, progress: Callable[[int], None] | None) -> _Writer:
        if kind == "chat":
            return _Conversation(self, progress)
        return _Text(self, progress)

    def _longest(self) -> int:
        answer = self.settings.max_new_tokens
        text = max(1, self.longest_prompt) + answer
        if self.format is None:
            return text
        if self.questions is not None:
            return max(question.length(answer) for question in self.questions.questions)
        turn = self.settings.max_user_tokens + len(self.format.before_answer) + answer
        later = self.settings.turns - 1
        chat = len(self.format.before_user) + turn + later * (len(self.format.before_next_user) + turn)
        return max(text, chat)

    def _run_in_batches(self, writers: Sequence[_Writer]) -> None:
        """Turn by turn: all have the same kind of turn at the same time."""
        s = self.settings
        writing = [(writer, writer.begin()) for writer in writers]
        while writing:
            said = sample_continuations(
                self.model,
                [writer.ids for writer, _ in writing],
                max_new_tokens=writing[0][1].limit,
                stop_ids=self.stops,
                temperature=s.temperature,
                top_p=s.top_p,
                top_k=s.top_k,
            )
            heard = [(writer, writer.hear(ids)) for (writer, _), ids in zip(writing, said, strict=True)]
            writing = [(writer, turn) for writer, turn in heard if turn is not None]

    def words(self, ids: Sequence[int]) -> str:
        """The text of a turn, without the token that ended it."""
        said = ids[:-1] if ids and ids[-1] in self.stops else ids
        return decode(self.tokenizer, said, specials=False)


class _Writer:
    """A document being written, as a speaker of the engine: ``ids`` is all of it so far."""

    def __init__(self, sampler: Sampler, progress: Callable[[int], None] | None) -> None:
        self.sampler, self.progress = sampler, progress
        self.seed = 0
        self.ids: list[int] = []
        self.document: Document | None = None

    def begin(self) -> Turn:
        """The prompt, and how much may be said."""
        raise NotImplementedError

    def hear(self, ids: list[int]) -> Turn | None:
        """Takes in what was said; what follows, or ``None`` at the end."""
        raise NotImplementedError

    def _finish(self, document: Document) -> None:
        self.document = document
        if self.progress is not None:
            self.progress(len(document))


class _Text(_Writer):
    """Plain text after the token that documents begin with."""

    def begin(self) -> Turn:
        assert self.sampler.start is not None
        self.ids = [self.sampler.start]
        return Turn(self.ids, self.sampler.settings.max_new_tokens)

    def hear(self, ids: list[int]) -> Turn | None:
        words = self.sampler.words(ids)
        if words.strip():
            whole = np.asarray([*self.ids, *ids])
            self._finish(Document(document_id(words), "text", words, whole, loss_start=1))
        return None


class _Answer(_Writer):
    """What follows a given prompt."""

    def __init__(self, sampler: Sampler, prompt: Sequence[int]) -> None:
        super().__init__(sampler, None)
        self.ids = list(prompt)

    def begin(self) -> Turn:
        return Turn(self.ids, self.sampler.settings.max_new_tokens)

    def hear(self, ids: list[int]) -> Turn | None:
        if self.sampler.words(ids).strip():
            whole = [*self.ids, *ids]
            text = decode(self.sampler.tokenizer, whole, specials=True)
            self._finish(Document(document_id(text), "text", text, np.asarray(whole), loss_start=len(self.ids)))
        return None


class _Conversation(_Writer):
    """Questions and answers in turns.

    ``answer_start`` is where the latest answer begins, ``answers`` where those stand that have been heard;
    ``finished`` counts the tokens and the turns of the exchanges that are over.
    """

    def __init__(self, sampler: Sampler, progress: Callable[[int], None] | None) -> None:
        super().__init__(sampler, progress)
        assert sampler.format is not None
        self.format = sampler.format
        self.messages: list[Message] = []
        self.answer_start = 0
        self.answers: list[tuple[int, int]] = []
        self.finished = (0, 0)

    def begin(self) -> Turn:
        self.ids = list(self.format.before_user)
        return Turn(self.format.before_user, self.sampler.settings.max_user_tokens)

    def hear(self, ids: list[int]) -> Turn | None:
        asked = len(self.messages) % 2 == 0  # a question was
        if not self._is_finished("user" if asked else "assistant", ids):
            return None
        if asked:
            return self._let_answer(self.format.before_answer)
        if len(self.messages) == 2 * self.sampler.settings.turns:
            self._write()
            return None
        return self._go_on(self.format.before_next_user, self.sampler.settings.max_user_tokens)

    def _is_finished(self, role: str, ids: list[int]) -> bool:
        """Takes in a turn; one that is empty or was cut off ends the conversation."""
        words = self.sampler.words(ids)
        if not words.strip():
            self._drop()
            return False
        self.ids += ids
        self.messages.append({"role": role, "content": words.strip()})
        if role == "assistant":
            self.answers.append((self.answer_start, len(self.ids)))
        if ids[-1] not in self.sampler.stops:
            self._write()
            return False
        if role == "assistant":
            self.finished = (len(self.ids), len(self.messages))
        return True

    def _let_answer(self, given: Sequence[int]) -> Turn:
        turn = self._go_on(given, self.sampler.settings.max_new_tokens)
        self.answer_start = len(self.ids)
        return turn

    def _go_on(self, given: Sequence[int], limit: int) -> Turn:
        """What the template writes after a turn takes the place of the turn's end that was sampled."""
        self.ids = self.ids[:-1] + list(given)
        return Turn(given, limit)

    def _drop(self) -> None:
        """Ends the conversation before the exchange in which a question or an answer is empty."""
        num_ids, num_messages = self.finished
        del self.ids[num_ids:], self.messages[num_messages:]
        if self.messages:
            self._write()

    def _write(self) -> None:
        text, ids = decode(self.sampler.tokenizer, self.ids, specials=True), np.asarray(self.ids)
        self._finish(conversation_document(text, ids, tuple(self.answers), tuple(self.messages)))


class _Interview(_Conversation):
    """Answers to questions that are given."""

    def __init__(self, sampler: Sampler, progress: Callable[[int], None] | None, question: Question) -> None:
        super().__init__(sampler, progress)
        self.question, self.to_ask = question, list(question.later)

    def begin(self) -> Turn:
        self.ids, self.messages = list(self.question.input_ids), list(self.question.opening)
        self.answer_start = len(self.ids)
        return Turn(self.ids, self.sampler.settings.max_new_tokens)

    def hear(self, ids: list[int]) -> Turn | None:
        if not self._is_finished("assistant", ids):
            return None
        if not self.to_ask:
            self._write()
            return None
        text, given = self.to_ask.pop(0)
        self.messages.append({"role": "user", "content": text})
        return self._let_answer(given)

    def _finish(self, document: Document) -> None:
        super()._finish(replace(document, origin=self.question.id))


def _plain(form: ChatFormat) -> dict[str, Any]:
    """As JSON gives it back: a manifest that was read compares equal to one being made."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(form).items()}


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a document: those of answers, and plain text's."""
    end = document_end(tokenizer)
    return stop_ids(model, tokenizer) | (set() if end is None else {end})
