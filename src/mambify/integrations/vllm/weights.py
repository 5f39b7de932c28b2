"""From the weights of a saved hybrid, one by one, to the parameters of the model that vLLM builds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from mambify.config import ATTENTION, HybridConfig
from mambify.integrations.vllm.config import served_layout

#: our projection → (vLLM's stacked one, which part of it)
_STACKED: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class Served(NamedTuple):
    """One weight on its way into vLLM.

    Attributes:
        parameter: its name in the model.
        part: of a stacked projection, which part it is; ``None`` for a parameter of its own.
        tensor: the values, whole; each process of tensor parallelism takes its share.
    """

    parameter: str
    part: str | int | None
    tensor: Tensor


def served_weights(config: HybridConfig, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Served]:
    """The weights of a saved directory (our name, tensor) as vLLM's model takes them; of tied ones the embedding only.

    Raises:
        UnsupportedError: as :func:`mambify.integrations.vllm.config.served_layout`.
    """
    layout = served_layout(config)
    mixers = config.layer_mixers or []
    for name, tensor in weights:
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        found = re.fullmatch(r"(model\.layers\.(\d+)\.mixer\.)(.*)", name)
        if found is not None and mixers[int(found[2])] != ATTENTION:
            for own, value in layout.fold_mamba2(found[3], tensor):
                yield Served(found[1] + ("A" if own == "A_log" else own), None, value)
            continue
        module = name.split(".")[-2]
        stacked, part = _STACKED.get(module, (module, None))
        yield Served(name.replace(f".{module}.", f".{stacked}."), part, tensor)
