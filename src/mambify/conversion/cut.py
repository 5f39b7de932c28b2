"""A shallow model out of a deep one: some of its layers, with its embeddings, final norm and head.

Untrained it is a free draft for speculation; ``mambify draft`` trains it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mambify.config import HybridConfig
from mambify.errors import InvalidOptionError, did_you_mean
from mambify.families.load import LoadedModel, empty_model, load
from mambify.mixers import AttentionMixer, Mixer
from mambify.model import HybridBlock, HybridForCausalLM
from mambify.trimmed_head import TrimmedHead

#: how a number of layers is spread → what people read of it
SPREADS = {
    "even": "first and last, and the others evenly between: 0, 10, 20, 31",
    "ends": "half of them from the beginning, half from the end: 0, 1, 30, 31",
    "first": "from the beginning: 0, 1, 2, 3",
}


def choose_layers(num_layers: int, count: int, spread: str = "even") -> list[int]:
    """Which ``count`` of ``num_layers`` layers a cut model has.

    Args:
        spread: a row of :data:`SPREADS`.

    Raises:
        InvalidOptionError: no such spread, or more layers than there are.
    """
    if spread not in SPREADS:
        raise InvalidOptionError(f"unknown spread '{spread}': {did_you_mean(spread, SPREADS)}")
    if not 1 <= count <= num_layers:
        raise InvalidOptionError(f"{count} layers cannot be cut from a model of {num_layers}: choose 1 to {num_layers}")
    if spread == "first" or count == 1:
        return list(range(count))
    if spread == "ends":
        first = (count + 1) // 2
        return [*range(first), *range(num_layers - (count - first), num_layers)]
    return [i * (num_layers - 1) // (count - 1) for i in range(count)]


def cut_config(
    config: HybridConfig, layers: Sequence[int], *, vocabulary: int | None = None, features: bool = False
) -> HybridConfig:
    """The configuration of a model that has only ``layers`` of another one, in this order.

    Args:
        vocabulary: how many words its head knows; all by default.
        features: whether it reads its target's hidden states.

    Raises:
        InvalidOptionError: a layer that is not there, or named twice, or none; a number of words out of range.
    """
    count = config.num_hidden_layers
    outside = [i for i in layers if not 0 <= i < count]
    if outside:
        raise InvalidOptionError(f"layer {outside[0]} is out of range: this model has layers 0 to {count - 1}")
    if not layers or sorted(set(layers)) != list(layers):
        raise InvalidOptionError(f"layers {list(layers)} must be one or more, in rising order, each named once")
    if vocabulary is not None and not 1 <= vocabulary <= config.vocab_size:
        raise InvalidOptionError(f"a draft's head can know 1 to {config.vocab_size} words, not {vocabulary}")
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = len(layers)
    shallow.cut_from = list(layers) if config.cut_from is None else [config.cut_from[i] for i in layers]
    for name in ("layer_mixers", "layer_types"):
        setattr(shallow, name, [getattr(config, name)[i] for i in layers])
    if vocabulary is not None:
        shallow.draft_vocabulary, shallow.tie_word_embeddings = vocabulary, False
    shallow.draft_features = features or config.draft_features
    return shallow


def cut(
    model: str | Path | LoadedModel | HybridForCausalLM,
    layers: int | Sequence[int] = 2,
    *,
    spread: str = "even",
    token_ids: Tensor | None = None,
    features: bool = False,
) -> HybridForCausalLM:
    """A model that has some layers of another one and shares their weights, embeddings, final norm and head.

    Args:
        model: any mix of layers, or what :func:`mambify.load` takes.
        layers: how many, or which.
        spread: which ones, where a number is given; a row of :data:`SPREADS`.
        token_ids: the words that its head shall know, ``[W]`` int64 in rising order; all by default. Their rows are
            copied.
        features: whether it shall read its target's hidden states, which it does not heed before it is trained.

    Raises:
        InvalidOptionError: see :func:`choose_layers` and :func:`cut_config`.
    """
    if isinstance(model, LoadedModel):
        model = model.model
    if not isinstance(model, HybridForCausalLM):
        model = load(model, with_tokenizer=False).model
    chosen = choose_layers(model.config.num_hidden_layers, layers, spread) if isinstance(layers, int) else list(layers)
    words = None if token_ids is None else len(token_ids)
    shallow = empty_model(cut_config(model.config, chosen, vocabulary=words, features=features))
    shallow.model.embed_tokens, shallow.model.norm = model.model.embed_tokens, model.model.norm
    if model.model.feature_input is not None:
        shallow.model.feature_input = model.model.feature_input
    elif shallow.model.feature_input is not None:
        shallow.model.feature_input.to_empty(device=model.device).to(model.dtype).start_plain()
    shallow.model.rotary_emb = model.model.rotary_emb
    shallow.lm_head = model.lm_head if token_ids is None else TrimmedHead.of(model.lm_head, token_ids)
    for ours, index in zip(shallow.model.layers, chosen, strict=True):
        theirs = model.model.layers[index]
        assert isinstance(ours, HybridBlock) and isinstance(theirs, HybridBlock)
        _share(ours, theirs)
    shallow.generation_config = copy.deepcopy(model.generation_config)
    shallow.eval()
    return shallow


def _share(ours: nn.Module, theirs: nn.Module) -> None:
    """Gives a block the weights of another by reference; what counts layers stays its own."""
    for name, child in theirs.named_children():
        if isinstance(child, Mixer):
            mixer = getattr(ours, name)
            for leaf, parameter in child.named_parameters(recurse=False):
                setattr(mixer, leaf, parameter)
            for part, module in child.named_children():
                if not (isinstance(child, AttentionMixer) and part == "attend"):
                    setattr(mixer, part, module)
        else:
            setattr(ours, name, child)


def most_frequent(token_ids: Tensor, count: int, vocab_size: int, *, always: Sequence[int] = ()) -> Tensor:
    """The ``count`` tokens that are most frequent in a text, in rising order: int64 ``[count]``.

    Args:
        token_ids: the text, in any shape.
        always: tokens that are among them however rare, such as those that end an answer.

    Raises:
        InvalidOptionError: more tokens than the vocabulary has, or fewer than there are in ``always``.
    """
    if not max(len(set(always)), 1) <= count <= vocab_size:
        raise InvalidOptionError(
            f"a vocabulary of {count} words cannot be: choose {max(len(set(always)), 1)} to {vocab_size}"
        )
    frequency_V = torch.bincount(token_ids.flatten(), minlength=vocab_size)
    frequency_V[list(always)] = torch.iinfo(torch.long).max
    order_V = frequency_V.sort(descending=True, stable=True).indices
    return order_V[:count].sort().values
