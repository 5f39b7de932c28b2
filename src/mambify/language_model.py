"""What is asked of any causal language model of transformers', this package's among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def position_limit(config: PreTrainedConfig) -> int | None:
    """The most tokens of a text that a model's attention has learned positions for; what comes beyond is noise.

    ``None`` where no layer attends, whatever number the config names, and where it names none.
    """
    text = config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    attention_layers = getattr(text, "attention_layers", None)  # of configs of this package
    return None if attention_layers == [] else limit


def end_token_ids(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text, by the model's own word (Llama 3 has several)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = model.config.eos_token_id if named is None else named
    if named is None:
        return []
    return [named] if isinstance(named, int) else list(named)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the model's own, and the tokenizer's."""
    stops = set(end_token_ids(model))
    return stops if tokenizer.eos_token_id is None else stops | {tokenizer.eos_token_id}


@contextmanager
def evaluating(*models: PreTrainedModel | None) -> Iterator[None]:
    """Evaluation mode meanwhile, and afterwards the mode of before."""
    present = [model for model in models if model is not None]
    were_training = [model.training for model in present]
    for model in present:
        model.eval()
    try:
        yield
    finally:
        for model, was_training in zip(present, were_training, strict=True):
            model.train(was_training)
