"""``mambify.generate``: token ids from token ids.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mambify.decode.sampling import Sampling
from mambify.decode.speculative import generate_speculatively
from mambify.decode.steps import decode_steps, left_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    draft: PreTrainedModel | str | None = None,
    num_draft_tokens: int | tuple[int, int] | str = 4,
) -> Tensor:
    """Continues every row of ``input_ids`` until its end token, or for ``max_new_tokens``.

    Args:
        model: a :class:`~mambify.model.HybridForCausalLM`, or any causal language model of transformers'.
        input_ids: prompts ``[B, T]`` on the model's device.
        temperature: 0 takes the likeliest token, and then gives what ``model.generate`` gives.
        top_k, top_p: see :class:`~mambify.decode.sampling.Sampling`.
        seed: the same seed gives the same tokens; torch's global generator where ``None``.
        eos_token_id: tokens that end a row; the model's own where ``None``, none at all where empty.
        attention_mask: ``[B, T]``, 0 where a row is padded on the left.
        draft: a smaller model of the same vocabulary that puts tokens forward; ``"lookup"``, which takes them from the
            text so far; or ``"cut:2"``, two layers of the model itself. The tokens that come out are the model's own
            (at temperature 0 the very same ones, above it distributed as without a draft); only their speed changes.
        num_draft_tokens: how many are put forward at a time, 1 to 16. ``(2, 6)`` or ``"auto"`` leaves the number to
            what gives the most tokens a second; the draws of one seed may then differ from run to run.

    Returns:
        ``[B, T + new]``: the prompts with what follows; a row that ended is filled up with the padding token (the end
        token where there is none).

    Raises:
        InvalidOptionError: a setting out of range, an empty prompt, padding on the right, or a draft of another
            vocabulary.
        UnsupportedError: a draft for a model that is not of this package.
    """
    sampling = Sampling(temperature, top_k, top_p, max_new_tokens)
    stops = end_token_ids(model) if eos_token_id is None else _as_list(eos_token_id)
    padding = _padding_id(model, stops)
    if draft is not None:
        mask, _ = left_padding(input_ids, attention_mask)
        return generate_speculatively(
            model,
            input_ids,
            draft,
            sampling,
            stop_ids=stops,
            padding_id=padding,
            num_draft_tokens=num_draft_tokens,
            mask_BT=mask,
            seed=seed,
        )
    stops_E = torch.tensor(stops, dtype=torch.long, device=input_ids.device)
    ended_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    columns = [input_ids]
    for next_B in decode_steps(model, input_ids, sampling, attention_mask_BT=attention_mask, seed=seed):
        columns.append(next_B.masked_fill(ended_B, padding)[:, None])
        ended_B = ended_B | torch.isin(next_B, stops_E)
        if stops and bool(ended_B.all()):
            break
    return torch.cat(columns, dim=1)


def end_token_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text, by the model's own word (Llama 3 has several)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    return _as_list(model.config.eos_token_id if named is None else named)


def _padding_id(model: PreTrainedModel, stops: Sequence[int]) -> int:
    candidates = [getattr(model.generation_config, "pad_token_id", None), model.config.pad_token_id, *stops, 0]
    return next(int(candidate) for candidate in candidates if candidate is not None)


def _as_list(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
