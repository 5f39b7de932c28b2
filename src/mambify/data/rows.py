"""What a row of a data file means: plain text, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambify.data.chat import Message
from mambify.errors import UsageError


@dataclass(frozen=True)
class Conversation:
    """A row that goes through the chat template."""

    messages: tuple[Message, ...]


Row = str | Conversation

_ROLES = {"human": "user", "gpt": "assistant"}  # the names of ShareGPT rows
_ANSWERS = ("response", "output", "completion", "answer")
KNOWN_ROWS = "{text}, {messages}, {prompt, response} or {instruction, …}"


def interpret_row(row: Any, where: str) -> Row:
    """The text or conversation that a row holds; ``where`` names it in errors.

    Raises:
        UsageError: no usable field, or one of the wrong type or empty.
    """
    if not isinstance(row, Mapping):
        raise UsageError(f"{where}: expected an object with {KNOWN_ROWS}, found {type(row).__name__}")
    if "messages" in row or "conversations" in row:
        return Conversation(interpret_messages(row.get("messages", row.get("conversations")), where))
    if "text" in row:
        return _words(row, "text", where)
    if "instruction" in row:
        return _instruction(row, where)
    if "prompt" in row:
        return _turn(_words(row, "prompt", where), _words(row, _answer_field(row, where), where))
    raise UsageError(f"{where}: no usable field among {', '.join(map(repr, row)) or 'none'}; need {KNOWN_ROWS}")


def _turn(prompt: str, answer: str) -> Conversation:
    return Conversation(
        ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}),
    )


def _instruction(row: Mapping[str, Any], where: str) -> Conversation:
    prompt, instance = instruction_of(row, where)
    return _turn(prompt, _words(instance, _answer_field(instance, where), where))


def instruction_of(row: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    """An instruction with its input, and what of the row holds the answer; ``where`` names it in errors.

    Raises:
        UsageError: no instruction, or one that is no text.
    """
    instances = row.get("instances")  # self-instruct: one instruction, several {input, output}
    instance = instances[0] if isinstance(instances, list) and instances else row
    given = instance.get("input") or ""
    return _words(row, "instruction", where) + (f"\n\n{given}" if given else ""), instance


def _answer_field(row: Mapping[str, Any], where: str) -> str:
    for name in _ANSWERS:
        if name in row:
            return name
    raise UsageError(f"{where}: a prompt without an answer; need one of {', '.join(_ANSWERS)}")


def _words(row: Mapping[str, Any], name: str, where: str) -> str:
    words = row[name]
    if not isinstance(words, str) or not words.strip():
        raise UsageError(f"{where}: {name!r} must be text and not empty")
    return words


def interpret_messages(messages: Any, where: str) -> tuple[Message, ...]:
    """The turns of a conversation, ShareGPT's names among them; ``where`` names it in errors.

    Raises:
        UsageError: no list of turns with role and content.
    """
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: 'messages' must be a list of turns and not empty")
    turns: list[Message] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise UsageError(f"{where}: a turn must be an object with 'role' and 'content'")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UsageError(f"{where}: a turn needs 'role' and 'content' as text")
        turns.append({"role": _ROLES.get(role, role), "content": content})
    return tuple(turns)
