"""Questions for a teacher to answer: the user's side of conversations, from whatever file they stand in.

A question may have several turns, each asked when the one before it has been answered. Answers that stand in the file
are left out: what a student learns from are the teacher's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mambify.data.chat import ChatFormat, Message, encode_text, render
from mambify.data.documents import Source, document_id, raw_rows
from mambify.data.rows import instruction_of, interpret_messages
from mambify.errors import UsageError
from mambify.fingerprint import arrays_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN_QUESTIONS = "text, {prompt}, {question}, {turns}, {messages} or {instruction, …}"
_ONE_TURN = ("prompt", "question")


@dataclass(frozen=True)
class Question:
    """What a user says in one conversation.

    Attributes:
        id: of the first turn's text and the system message; on it depends which side of the split its answers fall on.
        opening: what stands before the first answer.
        input_ids: the same through the chat template, up to where the answer begins.
        later: the user's other turns, each as text and as the token ids between two answers.
    """

    id: str
    opening: tuple[Message, ...]
    input_ids: tuple[int, ...]
    later: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of its longest turn, as the template writes it."""
        return max(len(self.input_ids), *(len(ids) for _, ids in self.later), 0)

    def length(self, answer_tokens: int) -> int:
        """Tokens of the whole conversation, its answers being of this length."""
        given = len(self.input_ids) + sum(len(ids) for _, ids in self.later)
        return given + (1 + len(self.later)) * answer_tokens


@dataclass(frozen=True)
class Questions:
    """What a source held, in its order.

    Attributes:
        questions: those that are not too long, each once.
        too_long: how many were.
    """

    questions: tuple[Question, ...]
    too_long: int = 0

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def fingerprint(self) -> str:
        """A hash of all that is asked, in order."""
        # Every turn, and how many of them are one question's.
        turns = ((question.input_ids, *(ids for _, ids in question.later)) for question in self.questions)
        return arrays_fingerprint(np.array(ids) for question in turns for ids in (*question, [len(question)]))

    def in_turn(self, *, seed: int, start: int) -> Iterator[Question]:
        """Without end: all in an order drawn from the seed, then all again in another; from place ``start`` on."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.questions), generator=generator).tolist()
            yield from (self.questions[index] for index in order[start:])
            start = max(0, start - len(order))


def read_questions(
    source: Source | Sequence[Source], tokenizer: PreTrainedTokenizerBase, form: ChatFormat, *, max_tokens: int
) -> Questions:
    """Questions of a ``.jsonl``, a ``.json`` list, or a data set ``hf:name[:split]``; or of several of these.

    A row is the text of a question, or has it as ``prompt``, ``question`` or ``instruction`` (with ``input``), or has
    several as ``turns``, a list of texts, or among its ``messages``, of which a system message is kept too.

    Args:
        form: the tokenizer's chat template taken apart.
        max_tokens: questions with a turn of more tokens, template included, are left out and counted.

    Raises:
        UsageError: an unreadable row, named by file and line, or no question of that length.
        UnsupportedError: the chat template refuses a question.
        UnknownSourceError, MissingDependencyError: see :func:`mambify.data.documents.read_documents`.
    """
    found: dict[tuple[Any, ...], Question] = {}
    too_long = 0
    sources = [source] if not isinstance(source, Sequence) or isinstance(source, str) else source
    for one in sources:
        for where, row in raw_rows(one):
            question = _encode(tokenizer, form, interpret_question(row, where))
            if question.longest > max_tokens:
                too_long += 1
            else:
                found.setdefault((question.input_ids, question.later), question)
    if not found:
        said = f": all {too_long} are longer than {max_tokens} tokens" if too_long else ""
        raise UsageError(f"no question in {', '.join(map(str, sources))}{said}")
    return Questions(tuple(found.values()), too_long)


def interpret_question(row: Any, where: str) -> list[Message]:
    """The system message of a row, where there is one, and what its user says; ``where`` names it in errors.

    Raises:
        UsageError: no user's turn in it, or one that is empty or no text.
    """
    messages: list[Message]
    if isinstance(row, str):
        messages = [{"role": "user", "content": row}]
    elif not isinstance(row, Mapping):
        raise UsageError(f"{where}: expected {KNOWN_QUESTIONS}, found {type(row).__name__}")
    elif "messages" in row or "conversations" in row:
        said = interpret_messages(row.get("messages", row.get("conversations")), where)
        messages = [message for message in said if message["role"] != "assistant"]
    elif isinstance(row.get("turns"), list):
        messages = [{"role": "user", "content": turn} for turn in row["turns"]]
    elif "instruction" in row:
        messages = [{"role": "user", "content": instruction_of(row, where)[0]}]
    else:
        name = next((name for name in _ONE_TURN if name in row), None)
        if name is None:
            raise UsageError(
                f"{where}: no question among {', '.join(map(repr, row)) or 'none'}; need {KNOWN_QUESTIONS}"
            )
        messages = [{"role": "user", "content": row[name]}]
    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if not roles or set(roles) != {"user"}:
        raise UsageError(f"{where}: a question needs a user's turn, and no role but system before it")
    for message in messages:
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise UsageError(f"{where}: what a user says must be text and not empty")
    return messages


def _encode(tokenizer: PreTrainedTokenizerBase, form: ChatFormat, messages: list[Message]) -> Question:
    first = next(index for index, message in enumerate(messages) if message["role"] == "user")
    opening = messages[: first + 1]
    prompt = render(tokenizer, opening, add_generation_prompt=True).rstrip(" ")
    later = [message["content"].strip() for message in messages[first + 1 :]]
    return Question(
        id=document_id(prompt),
        opening=tuple(opening),
        input_ids=tuple(encode_text(tokenizer, prompt)),
        later=tuple(
            (text, (*form.before_next_user, *encode_text(tokenizer, text), *form.before_answer)) for text in later
        ),
    )
