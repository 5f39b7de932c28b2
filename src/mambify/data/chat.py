"""What a tokenizer's own conventions say about a document: where it begins, and where a chat turn ends.

Nothing here knows a template by name. A template is rendered with sentinel messages and cut at them, so
ChatML, Llama 3, Zephyr and Mistral templates all give the same three strings: what stands before a user's
words, between them and the answer, and between an answer and the next user's words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from mambify.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


_USER, _ANSWER, _NEXT = "sentinel0user", "sentinel0answer", "sentinel0next"
_PLAIN_START = "<|endoftext|>"


@dataclass(frozen=True)
class ChatFormat:
    """A chat template taken apart into the token ids around what user and assistant say.

    ``before_user`` opens a conversation up to the first user's words; ``before_answer`` follows a user's
    words, turn end included; ``before_next_user`` follows an answer, turn end included.
    """

    before_user: tuple[int, ...]
    before_answer: tuple[int, ...]
    before_next_user: tuple[int, ...]
    user_end: int
    answer_end: int


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's model was taught a conversation format."""
    return bool(tokenizer.chat_template)


def document_start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that plain text began with in pretraining, or None where there is none.

    It is what the tokenizer itself puts before a text (Llama, Mistral: the bos token); failing that
    ``<|endoftext|>`` (Qwen and SmolLM2 set documents apart with it: the bos of SmolLM2-Instruct opens a
    chat turn, not a document), failing that bos.
    """
    with_specials = tokenizer.encode("a", add_special_tokens=True)
    bos: int | None = tokenizer.bos_token_id
    if bos is not None and with_specials[:1] == [bos]:
        return bos
    plain = tokenizer.get_vocab().get(_PLAIN_START)
    return bos if plain is None else plain


def document_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that plain text ends with: ``<|endoftext|>`` where documents begin with it, else eos."""
    start = document_start(tokenizer)
    if start is not None and start == tokenizer.get_vocab().get(_PLAIN_START):
        return start
    eos: int | None = tokenizer.eos_token_id
    return eos


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text`` alone: none added, special tokens written in it recognised, no length warning."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, specials: bool) -> str:
    """The text of ``ids``, with special tokens written out or left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not specials))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """The conversation as the tokenizer's template writes it.

    Raises:
        UnsupportedError: no template, or one that refuses these messages.
    """
    if not has_chat_template(tokenizer):
        raise UnsupportedError(
            "this tokenizer has no chat template: use plain text (--kind text, or rows with a 'text' field)"
        )
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": message["role"], "content": message["content"]} for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            # Llama 3 templates write the date of the day, and data must not depend on it.
            date_string="26 Jul 2024",
        )
    except TemplateError as error:
        raise UnsupportedError(f"the chat template refuses these messages: {error}") from error
    return str(rendered)


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Takes the tokenizer's chat template apart (see :class:`ChatFormat`).

    Raises:
        UnsupportedError: no template, or one in which a turn does not end with one special token, so that
            a model cannot be asked to finish a turn.
    """
    prompt: list[Message] = [{"role": "user", "content": _USER}]
    answer: list[Message] = [{"role": "assistant", "content": _ANSWER}]
    following: list[Message] = [{"role": "user", "content": _NEXT}]
    first = render(tokenizer, prompt, add_generation_prompt=True)
    whole = render(tokenizer, prompt + answer + following)
    before_user, found, before_answer = first.partition(_USER)
    between, found_next, _ = whole.partition(_ANSWER)[2].partition(_NEXT)
    if not found or not found_next:
        raise UnsupportedError("the chat template changes what the user says: use --kind text")
    return ChatFormat(
        before_user=_ids_before_words(tokenizer, before_user),
        before_answer=_ids_before_words(tokenizer, before_answer),
        before_next_user=_ids_before_words(tokenizer, between),
        user_end=_turn_end(tokenizer, before_answer, "a user's turn"),
        answer_end=_turn_end(tokenizer, between, "an answer"),
    )


class EncodedConversation(NamedTuple):
    """A finished conversation as tokens.

    Attributes:
        input_ids: all of it.
        answers: where each answer stands, ``(start, end)``; the token that ends its turn belongs to it.
        text: as the template wrote it.
    """

    input_ids: list[int]
    answers: tuple[tuple[int, int], ...]
    text: str


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> EncodedConversation:
    """A finished conversation as token ids, with the places of its answers.

    Prompts and answers are tokenized apart, as a model meets them in use; what the template writes after
    the last turn's end (ChatML: a newline) is left out, so that the document ends where a sampled one does.

    Raises:
        UnsupportedError: no template, no answer, or a template that writes prompt and answer inseparably.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UnsupportedError("a conversation without an assistant turn has nothing to learn from")
    whole = render(tokenizer, messages).rstrip()
    ids: list[int] = []
    starts: list[int] = []
    done = 0
    for turn in turns:
        prompt = render(tokenizer, messages[:turn], add_generation_prompt=True).rstrip(" ")
        if not whole.startswith(prompt) or len(prompt) < done:
            raise UnsupportedError("the chat template writes a finished answer differently from one being asked for")
        ids += encode_text(tokenizer, whole[done : len(prompt)])
        starts.append(len(ids))
        done = len(prompt)
    ids += encode_text(tokenizer, whole[done:])
    ends = [len(ids)] if turns[-1] == len(messages) - 1 else []
    if len(ends) < len(starts):  # something follows an answer: it ends with its turn
        stop = chat_format(tokenizer).answer_end
        ends = [ids.index(stop, start) + 1 for start in starts[: len(starts) - len(ends)]] + ends
    return EncodedConversation(ids, tuple(zip(starts, ends, strict=True)), whole)


def _ids_before_words(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    # A trailing space belongs to the first word that follows it: most tokenizers join the two.
    return tuple(encode_text(tokenizer, text.rstrip(" ")))


def _turn_end(tokenizer: PreTrainedTokenizerBase, after_words: str, turn: str) -> int:
    ids = encode_text(tokenizer, after_words.lstrip())
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not ids or ids[0] not in added:
        raise UnsupportedError(f"{turn} does not end with a special token in this chat template: use --kind text")
    return ids[0]
