"""``mambify.generate``: token ids from token ids.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from mambify.decode.detokenizer import Detokenizer
from mambify.decode.kept import kept_decoder
from mambify.decode.rows import require_count, require_positions, rows_of
from mambify.decode.stop import Cutter, stop_strings
from mambify.engine import DraftCount, Sampling
from mambify.errors import InvalidOptionError
from mambify.language_model import end_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mambify.decode.drafts import Draft

Prompts = TypeVar("Prompts", Tensor, list[list[int]])

#: told a prompt's number and all its new tokens so far; says how many of them stand, or ``None`` to go on
Ends = Callable[[int, list[int]], int | None]


def generate(
    model: PreTrainedModel,
    input_ids: Prompts,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    stop: str | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    attention_mask: Tensor | None = None,
    draft: Draft = None,
    num_draft_tokens: DraftCount = 4,
) -> Prompts:
    """Continues every row of ``input_ids`` until it ends, or for ``max_new_tokens``.

    Args:
        model: a :class:`~mambify.model.HybridForCausalLM`, or any causal language model of transformers'.
        input_ids: prompts ``[B, T]``, or lists of token ids of any lengths.
        temperature: 0 takes the likeliest token, and then gives what ``model.generate`` gives.
        top_k, top_p, min_p, repetition_penalty: see :class:`~mambify.engine.sampling.Sampling`.
        seed: the same seed gives the same tokens, with one number a row each row those it has alone; torch's global
            generator where ``None``.
        eos_token_id: tokens that end a row; the model's own where ``None``, none at all where empty.
        stop: strings that end a row as soon as its new text has one of them; the token that completes it is the last.
        tokenizer: the model's, for ``stop``.
        attention_mask: ``[B, T]``, 0 where a row is padded on the left.
        draft: a smaller model of the same vocabulary that puts tokens forward; ``"lookup"``, which takes them from the
            text so far; or ``"cut:2"``, two layers of the model itself. The tokens that come out are the model's own
            (at temperature 0 the very same ones, above it distributed as without a draft); only their speed changes.
        num_draft_tokens: how many are put forward at a time, 1 to 16. ``(2, 6)`` or ``"auto"`` leaves the number to
            what gives the most tokens a second; the draws of one seed may then differ from run to run.

    Returns:
        Prompts with what follows. For a tensor ``[B, T + new]``, where a row that ended is filled up with the padding
        token (the end token where there is none); for lists a list a prompt, without padding.

    Raises:
        InvalidOptionError: a setting out of range, an empty prompt, padding on the right, a draft of another
            vocabulary, more tokens than the model has positions, or than memory holds.
        UnsupportedError: a draft for a model that is not of this package.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    require_count(max_new_tokens)
    rows = rows_of(input_ids, attention_mask)
    strings = stop_strings(stop)
    if strings and tokenizer is None:
        raise InvalidOptionError("stop strings are looked for in text: give the tokenizer as well")
    if eos_token_id is None:
        eos_token_id = end_token_ids(model)
    stops = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    answers = continue_rows(
        model,
        rows,
        sampling,
        max_new_tokens=max_new_tokens,
        stop_ids=stops,
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        ends=string_ends(tokenizer, strings, len(rows)) if tokenizer is not None and strings else None,
    )
    if not isinstance(input_ids, Tensor):
        return [row + answer for row, answer in zip(rows, answers, strict=True)]
    return filled_up(input_ids, answers, padding_id(model, stops))


def continue_rows(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    draft: Draft = None,
    num_draft_tokens: DraftCount = 4,
    ends: Ends | None = None,
) -> list[list[int]]:
    """The new tokens of each row, stop tokens included.

    Args:
        ends: asked whenever a row has new tokens; see :data:`Ends`.

    Raises:
        InvalidOptionError: as :func:`generate`.
        UnsupportedError: as :func:`generate`.
    """
    seeds = sampling.seeds(len(rows))
    longest = max(map(len, rows))
    require_positions(model, longest, max_new_tokens)
    decoder = kept_decoder(
        model,
        draft,
        sampling,
        max_length=longest + max_new_tokens,
        stop_ids=stop_ids,
        num_draft_tokens=num_draft_tokens,
        num_slots=len(rows),
    )
    answers: list[list[int]] = [[] for _ in rows]
    for number, tokens in decoder.run(rows, max_new_tokens=max_new_tokens, seeds=seeds):
        answers[number] += tokens
        if ends is not None and (count := ends(number, answers[number])) is not None:
            del answers[number][count:]
            decoder.dismiss(number)
    return answers


def string_ends(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], rows: int) -> Ends:
    """Ends a row with the token that completes one of ``strings`` in its new text."""
    readers = [(Detokenizer(tokenizer), Cutter(strings)) for _ in range(rows)]
    heard = [0] * rows

    def ends(number: int, tokens: list[int]) -> int | None:
        detokenizer, cutter = readers[number]
        for token in tokens[heard[number] :]:
            heard[number] += 1
            cutter.add(detokenizer.add(token))
            if cutter.found is not None:
                return heard[number]
        return None

    return ends


def filled_up(input_ids_BT: Tensor, answers: Sequence[Sequence[int]], padding_id: int) -> Tensor:
    """Prompts and answers as one tensor ``[B, T + new]``, filled up on the right."""
    width = max(map(len, answers))
    padded = [[*answer, *[padding_id] * (width - len(answer))] for answer in answers]
    return torch.cat([input_ids_BT, torch.tensor(padded, device=input_ids_BT.device)], dim=1)


def padding_id(model: PreTrainedModel, stops: Sequence[int]) -> int:
    """What fills up rows that ended: the padding token, the end token where there is none."""
    candidates = [getattr(model.generation_config, "pad_token_id", None), model.config.pad_token_id, *stops, 0]
    return next(int(candidate) for candidate in candidates if candidate is not None)
