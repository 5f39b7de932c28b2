"""``model.generate(..., custom_generate=mambify.custom_generate)``: transformers' interface over this package's loop.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from mambify.decode.generate import Ends, continue_rows, filled_up, padding_id
from mambify.decode.rows import rows_of
from mambify.engine import DraftCount, Sampling
from mambify.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from mambify.decode.drafts import Draft

#: what the engine draws by, in the order it applies them, which is transformers' own: the processor, what it keeps the
#: setting in, and the setting
_KNOWN: tuple[tuple[type, str, str], ...] = (
    (RepetitionPenaltyLogitsProcessor, "penalty", "repetition_penalty"),
    (TemperatureLogitsWarper, "temperature", "temperature"),
    (TopKLogitsWarper, "top_k", "top_k"),
    (TopPLogitsWarper, "top_p", "top_p"),
    (MinPLogitsWarper, "min_p", "min_p"),
)


class _Limits(TypedDict):
    max_new_tokens: int
    stop_ids: list[int]
    ends: Ends | None


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    draft: Draft = None,
    num_draft_tokens: DraftCount = 4,
    seed: int | Sequence[int] | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continues prompts as ``model.generate`` is asked to, with a draft: to be given to it, not called.

    >>> model.generate(**inputs, max_new_tokens=64, custom_generate=mambify.custom_generate, draft=draft)

    transformers has prepared everything by then: prompts repeated for ``num_return_sequences``, what a
    ``generation_config`` asks for as logits processors, what ends a row as stopping criteria. Sampling follows ``seed``
    and not the device's generator. Criteria other than end tokens and lengths are asked after every token, row by row.
    (``streamer`` and ``tokenizer`` never arrive here: transformers keeps them from a function. For stop strings give
    ``stopping_criteria=StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])``.)

    Args:
        draft, num_draft_tokens, seed: see :func:`mambify.generate`.

    Raises:
        UnsupportedError: beams, constraints, processors of another kind, a cache that holds tokens, inputs that are
            no token ids, or scores among the outputs.
        InvalidOptionError: as :func:`mambify.generate`.
    """
    if generation_config is None:
        raise UnsupportedError(
            "custom_generate is to be given to model.generate: custom_generate=mambify.custom_generate"
        )
    _refuse_others(generation_config, model_kwargs)
    sampling = _sampling(logits_processor or (), do_sample=bool(generation_config.do_sample), seed=seed)
    limits = _limits(stopping_criteria or (), input_ids)
    rows = rows_of(input_ids, model_kwargs.get("attention_mask"))
    answers = continue_rows(model, rows, sampling, draft=draft, num_draft_tokens=num_draft_tokens, **limits)
    padding = generation_config._pad_token_tensor
    fill = padding_id(model, limits["stop_ids"]) if padding is None else int(padding)
    sequences_BT = filled_up(input_ids, answers, fill)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences_BT)
    return sequences_BT


def _refuse_others(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    if (config.num_beams or 1) > 1:
        raise UnsupportedError(f"num_beams={config.num_beams}: drafts are for one beam a row, num_beams=1")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise UnsupportedError(f"{name}=True: with custom_generate only the tokens are known")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UnsupportedError("past_key_values holds tokens already: give the whole prompt and no cache")
    if model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedError("inputs_embeds: custom_generate continues token ids, give input_ids")


def _sampling(processors: Sequence[Any], *, do_sample: bool, seed: int | Sequence[int] | None) -> Sampling:
    """The settings that ``processors`` stand for."""
    settings: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    reached = 0
    for processor in processors:
        if isinstance(processor, LogitNormalization):  # changes no probability
            continue
        place = next((index for index, (kind, *_) in enumerate(_KNOWN) if type(processor) is kind), None)
        if place is None or getattr(processor, "prompt_ignore_length", None):
            known = ", ".join(name for *_, name in _KNOWN)
            raise UnsupportedError(
                f"{type(processor).__name__} has no counterpart with custom_generate, which knows {known}"
            )
        if place < reached:
            raise UnsupportedError(f"{type(processor).__name__} comes twice, or later than custom_generate applies it")
        reached = place + 1
        _, attribute, name = _KNOWN[place]
        if do_sample or name == "repetition_penalty":
            settings[name] = getattr(processor, attribute)
    return Sampling(**settings, seed=seed)


def _limits(criteria: Sequence[Any], input_ids_BT: Tensor) -> _Limits:
    """What ends a row: its length, its end tokens, and whatever else there is, asked token by token."""
    max_length, stops, others = None, [], []
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            max_length = min(criterion.max_length, max_length or criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            stops += criterion.eos_token_id.flatten().tolist()
        else:
            others.append(criterion)
    if max_length is None:
        raise UnsupportedError("nothing limits the length: give max_new_tokens")
    heard = [0] * len(input_ids_BT)

    def ends(number: int, tokens: list[int]) -> int | None:
        new_N = torch.tensor(tokens, dtype=input_ids_BT.dtype, device=input_ids_BT.device)
        row_1T = torch.cat([input_ids_BT[number], new_N])[None]
        begin, heard[number] = heard[number], len(tokens)
        for count in range(begin + 1, len(tokens) + 1):
            upto_1T = row_1T[:, : input_ids_BT.shape[1] + count]
            if any(bool(torch.as_tensor(criterion(upto_1T, None)).all()) for criterion in others):
                return count
        return None

    return {"max_new_tokens": max_length - input_ids_BT.shape[1], "stop_ids": stops, "ends": ends if others else None}
