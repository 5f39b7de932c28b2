"""A model as lm-eval asks one: log likelihoods of continuations, of whole texts, and answers.

lm-eval's own ``LM`` is not inherited from, so that this package imports without lm-eval: its ``evaluate`` calls the
methods and does not ask for the class. Where a text is split into context and continuation, and what stands before an
empty context, is as in lm-eval's ``hf`` model, so that figures can be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mambify.errors import UnsupportedError, UsageError
from mambify.evaluate.tasks.generation import generate_until
from mambify.evaluate.tasks.likelihood import Continuation, Likelihood, LikelihoodScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
_DEFAULT_MAX_LENGTH = 2048  # as lm-eval, for a model that names none
_DEFAULT_NEW_TOKENS = 256
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Request(Protocol):
    """What is used of lm-eval's ``Instance``."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class TaskModel:
    """One model with its tokenizer, for lm-eval.

    Args:
        model: Any causal language model of transformers', in its own dtype and on its own device; put into evaluation
            mode.
        tokenizer: Its tokenizer.
        batch_size: Continuations or prompts in a forward pass; ``None`` goes by their length and the device, and
            halves where memory runs out.
        max_length: Tokens the model can hold; its own limit where ``None``.
        progress: Called with (what, done, all).
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length or _max_length(model)
        self._progress = progress
        self._score = LikelihoodScorer(model, max_length=self.max_length, batch_size=batch_size)

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self.model.device

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context: bos, else eos.

        Raises:
            UnsupportedError: the tokenizer has neither.
        """
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise UnsupportedError("the tokenizer has neither a bos nor an eos token to begin a text with")

    def loglikelihood(self, requests: Sequence[Request]) -> list[Likelihood]:
        """For each ``(context, continuation)``: its log likelihood in nats, and whether greedy decoding gives it."""
        pairs = [self.encode_pair(*request.args) for request in requests]
        return self._score(pairs, self._counter("choices"))

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Log likelihood of each whole ``(text,)``: every token predicted once, with as long a context as there is."""
        windows = [self._windows(self.encode(request.args[0], special=False)) for request in requests]
        scores = iter(self._score([window for text in windows for window in text], self._counter("texts")))
        return [sum(next(scores).log_likelihood for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """An answer to each ``(context, settings)``; ``until`` and ``max_gen_toks`` are among the settings."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        report = self._counter("answers")
        for indices in groups.values():
            done = len(answers)
            given = generate_until(
                self.model,
                self.tokenizer,
                [self.encode(requests[index].args[0]) for index in indices],
                max_length=self.max_length,
                batch_size=self.batch_size,
                progress=lambda n, done=done: report(done + n, len(requests)),  # type: ignore[misc]
                **_settings(requests[indices[0]].args[1]),
            )
            answers.update(zip(indices, given, strict=True))
        return [answers[index] for index in range(len(requests))]

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """Token ids; ``special`` says whether the tokenizer adds its own: by default unless they stand there."""
        if special is None:
            bos = self.tokenizer.bos_token
            special = not (bos and text.startswith(bos))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special, verbose=False)
        return ids

    def encode_pair(self, context: str, continuation: str) -> Continuation:
        """Splits the tokens of both texts together where those of the context end.

        Spaces at the end of the context go to the continuation, with whose word they make a token.

        Raises:
            UsageError: nothing is left to score.
        """
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        if bare:
            before = self.encode(bare)
            ids = self.encode(bare + continuation)[len(before) :]
        else:
            before = []
            ids = self.encode(continuation, special=False)
        if not before:
            prefix = self.prefix_token_id
            before, ids = ([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:])
        if not ids:
            raise UsageError(f"the continuation {continuation!r} has no token of its own after {bare[-40:]!r}")
        return Continuation(tuple(before), tuple(ids))

    def _windows(self, ids: list[int]) -> list[Continuation]:
        """A text as continuations that cover it once; each after the first has a whole window's worth behind it."""
        length = self.max_length
        text = [self.prefix_token_id, *ids]
        windows = []
        for first in range(1, len(text), length):
            last = min(first + length, len(text))
            windows.append(Continuation(tuple(text[max(0, last - 1 - length) : first]), tuple(text[first:last])))
        return windows

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as one prompt.

        Raises:
            UnsupportedError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise UnsupportedError("this tokenizer has no chat template: leave --chat-template out")
        return str(
            self.tokenizer.apply_chat_template(
                list(chat_history),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, or None where none is asked for."""
        return str(self.tokenizer.chat_template) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Names tokenizer and template in lm-eval's cache of requests."""
        text = f"{self.tokenizer.name_or_path} {self.tokenizer.chat_template}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _counter(self, what: str) -> Callable[[int, int], None]:
        progress = self._progress
        return (lambda done, total: None) if progress is None else (lambda done, total: progress(what, done, total))


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's generation settings in :func:`generate_until`'s names; greedy unless a temperature is given."""
    settings = dict(given)
    until = settings.pop("until", None) or []
    lengths = [settings.pop(name) for name in _NEW_TOKENS if name in settings]
    sample = settings.pop("do_sample", None)
    temperature = float(settings.pop("temperature", 0.0) or 0.0)
    if sample is None:
        sample = temperature > 0.0
    if sample and temperature > 0.0:
        settings["temperature"] = temperature
    if not sample:
        for name in ("top_p", "top_k", "min_p"):
            settings.pop(name, None)  # they say nothing where nothing is drawn
    return settings | {
        "until": [until] if isinstance(until, str) else list(until),
        "max_new_tokens": int(lengths[0]) if lengths else _DEFAULT_NEW_TOKENS,
        "do_sample": bool(sample),
    }


def _max_length(model: PreTrainedModel) -> int:
    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(named or _DEFAULT_MAX_LENGTH)
