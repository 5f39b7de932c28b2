"""Drawing documents from a teacher, a batch at a time: conversations through its template, or plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mambify.data.chat import ChatFormat, Message, chat_format, decode, document_end, document_start
from mambify.data.documents import DEFAULT_HELDOUT, Document, Kind, document_id
from mambify.data.sample import sample_continuations
from mambify.errors import InvalidOptionError, UnsupportedError, did_you_mean

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
    """Draws batches of documents of one kind."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.device = torch.device(model.device)
        self.format: ChatFormat | None = chat_format(tokenizer) if "chat" in settings.kinds else None
        self.start = document_start(tokenizer)
        if "text" in settings.kinds and self.start is None:
            raise UnsupportedError("this tokenizer has no token that begins a document: use --kind chat")
        self.stops = _stop_ids(model, tokenizer) | (
            set() if self.format is None else {self.format.user_end, self.format.answer_end}
        )
        self.longest = self._longest()
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and self.longest > limit:
            raise InvalidOptionError(
                f"documents of up to {self.longest} tokens do not fit the teacher's {limit} positions: "
                "lower max_new_tokens, max_user_tokens or turns"
            )

    def facts(self) -> dict[str, Any]:
        """What the tokenizer's conventions contribute to the bytes."""
        return {
            "stops": sorted(self.stops),
            "document_start": self.start,
            "chat_format": None if self.format is None else _plain(self.format),
        }

    def sample(self, kind: Kind, rows: int) -> list[Document]:
        """Up to ``rows`` documents (empty ones are dropped), in a fixed order."""
        with _evaluating(self.model):
            return self._chat(rows) if kind == "chat" else self._text(rows)

    def _longest(self) -> int:
        answer = self.settings.max_new_tokens
        text = 1 + answer
        if self.format is None:
            return text
        turn = self.settings.max_user_tokens + len(self.format.before_answer) + answer
        later = self.settings.turns - 1
        chat = len(self.format.before_user) + turn + later * (len(self.format.before_next_user) + turn)
        return max(text, chat)

    def _continue(self, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        if not prompts:
            return []
        s = self.settings
        return sample_continuations(
            self.model,
            prompts,
            max_new_tokens=limit,
            stop_ids=self.stops,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
        )

    def _text(self, rows: int) -> list[Document]:
        assert self.start is not None
        documents = []
        for ids in self._continue([[self.start]] * rows, self.settings.max_new_tokens):
            words = self._words(ids)
            if words.strip():
                whole = np.asarray([self.start, *ids])
                documents.append(Document(document_id(words), "text", words, whole, loss_start=1))
        return documents

    def _chat(self, rows: int) -> list[Document]:
        assert self.format is not None
        drafts = [_Draft(list(self.format.before_user), []) for _ in range(rows)]
        for turn in range(self.settings.turns):
            writing = [draft for draft in drafts if draft.open]
            if turn:
                for draft in writing:
                    draft.finished = (len(draft.ids), len(draft.messages))
                    draft.extend(self.format.before_next_user)
            self._let_speak(writing, "user", self.settings.max_user_tokens)
            writing = [draft for draft in writing if draft.open]
            for draft in writing:
                draft.extend(self.format.before_answer)
                draft.loss_start = draft.loss_start or len(draft.ids)
            self._let_speak(writing, "assistant", self.settings.max_new_tokens)
        return [self._finish(draft) for draft in drafts if draft.messages]

    def _let_speak(self, drafts: Sequence[_Draft], role: str, limit: int) -> None:
        """Adds one turn to every draft, in place; one that says nothing takes its exchange with it."""
        for draft, ids in zip(drafts, self._continue([d.ids for d in drafts], limit), strict=True):
            words = self._words(ids)
            draft.open = ids[-1] in self.stops
            if not words.strip():
                draft.drop()
                continue
            draft.ids += ids
            draft.messages.append({"role": role, "content": words.strip()})

    def _finish(self, draft: _Draft) -> Document:
        text = decode(self.tokenizer, draft.ids, specials=True)
        loss_start = draft.loss_start or len(draft.ids)
        return Document(document_id(text), "chat", text, np.asarray(draft.ids), loss_start, tuple(draft.messages))

    def _words(self, ids: Sequence[int]) -> str:
        said = ids[:-1] if ids and ids[-1] in self.stops else ids
        return decode(self.tokenizer, said, specials=False)


@dataclass
class _Draft:
    """A conversation being written.

    ``loss_start`` is 0 until the first answer begins; ``finished`` counts the tokens and the turns of the
    exchanges that are over.
    """

    ids: list[int]
    messages: list[Message]
    open: bool = True
    loss_start: int = 0
    finished: tuple[int, int] = (0, 0)

    def extend(self, after_words: Sequence[int]) -> None:
        """Appends what the template writes after a turn, in place of the turn's end that was sampled."""
        self.ids = self.ids[:-1] + list(after_words)

    def drop(self) -> None:
        """Ends the conversation before the exchange in which a question or an answer is empty."""
        self.open = False
        num_ids, num_messages = self.finished
        del self.ids[num_ids:], self.messages[num_messages:]


def _plain(form: ChatFormat) -> dict[str, Any]:
    """As JSON gives it back: a manifest that was read compares equal to one being made."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(form).items()}


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a document: the tokenizer's, the model's (Llama 3 has several), plain text's."""
    stops = {tokenizer.eos_token_id, document_end(tokenizer)}
    named = getattr(model.generation_config, "eos_token_id", None)
    stops |= set(named) if isinstance(named, list) else {named}
    return {stop for stop in stops if stop is not None}


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
