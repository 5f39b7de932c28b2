"""Answers that end at a stop string: batches padded on the left, cached, through the model's own ``generate``.

Letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from mambify.errors import InvalidOptionError
from mambify.evaluate.tasks.batching import batches, halving
from mambify.language_model import stop_ids as end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BYTES_A_CHARACTER = 4  # a token is at least one byte, a character at most four


@torch.inference_mode()
def generate_until(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    until: Sequence[str],
    max_new_tokens: int,
    max_length: int,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> list[str]:
    """Continues every prompt up to its first stop string, its end token, or ``max_new_tokens``.

    Args:
        model: A causal language model, on its own device.
        tokenizer: Its tokenizer.
        prompts: Token ids; too long ones lose their beginning.
        until: Stop strings, which are not part of the answer; a special token's name means that token.
        max_new_tokens: Length limit of an answer.
        max_length: Tokens of prompt and answer that the model can hold.
        batch_size: Rows in a batch; ``None`` goes by their length and the device.
        progress: Called with the number of prompts done.
        settings: For ``model.generate``: ``do_sample``, ``temperature``, ``top_p`` and the like.

    Returns:
        The answers, in the order of the prompts, without special tokens.

    Raises:
        InvalidOptionError: an answer as long as what the model can hold.
    """
    room = max_length - max_new_tokens
    if room < 1:
        raise InvalidOptionError(
            f"answers of {max_new_tokens} tokens leave no room for a question: the model holds {max_length}"
        )
    added = tokenizer.get_added_vocab()
    stop_ids = end_ids(model, tokenizer) | {added[text] for text in until if text in added}
    stop_texts = [text for text in until if text and text not in added]
    rows = [list(prompt)[-room:] for prompt in prompts]

    def answer(indices: Sequence[int]) -> list[str]:
        ids_BT, mask_BT = _left_padded([rows[index] for index in indices])
        generated_BT = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(stop_ids) or None,
            pad_token_id=min(stop_ids, default=0),
            stopping_criteria=StoppingCriteriaList([StopAtText(tokenizer, stop_texts, ids_BT.shape[1])]),
            **settings,
        )
        new_BT = generated_BT[:, ids_BT.shape[1] :].tolist()
        return [_text(tokenizer, ids, stop_ids, stop_texts) for ids in new_BT]

    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    answers: dict[int, str] = {}
    for batch in batches(
        order, lambda index: len(rows[index]) + max_new_tokens, batch_size=batch_size, device=model.device
    ):
        answers.update(zip(batch, halving(answer, batch), strict=True))
        if progress is not None:
            progress(len(answers))
    return [answers[index] for index in range(len(rows))]


class StopAtText(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once one of the texts stands in what was generated; the prompt is not searched."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.texts = texts
        self.prompt_length = prompt_length
        # So many last tokens hold every text that ends in the newest one, whatever the tokens are.
        self.window = _BYTES_A_CHARACTER * (max(map(len, texts), default=0) + 1)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows have ended, ``[B]``."""
        ended_B = torch.zeros(len(input_ids), dtype=torch.bool)
        if self.texts:
            tail_BT = input_ids[:, max(self.prompt_length, input_ids.shape[1] - self.window) :]
            tails = self.tokenizer.batch_decode(tail_BT, skip_special_tokens=True)
            ended_B = torch.tensor([any(text in tail for text in self.texts) for tail in tails])
        return ended_B.to(input_ids.device)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_ids: set[int], stop_texts: Sequence[str]) -> str:
    end = next((index for index, token_id in enumerate(ids) if token_id in stop_ids), len(ids))
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    return text[: min((text.find(stop) for stop in stop_texts if stop in text), default=len(text))]


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, ``[B, T]`` each."""
    length = max(map(len, rows))
    ids = [[0] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
