"""transformers' own decoding, for ``mambify bench decode`` and ``export``."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

_TOKENS, _SETTLING = 24, 6  # of a measured generation; tokens of it before times count


class _Stamps(BaseStreamer):  # type: ignore[misc]
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def llama(device: str, dtype: torch.dtype, **sizes: Any) -> LlamaForCausalLM:
    """A Llama whose weights are drawn on the device."""
    config = LlamaConfig(**sizes, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def token_times(
    model: PreTrainedModel, ids_BT: Tensor, *, compiled: bool, new_tokens: int
) -> tuple[list[float], Tensor]:
    """When ``generate`` began and when each token came, greedy, every row to the end; and the tokens with the prompts.

    Args:
        compiled: with a static cache, for which transformers compiles the model; else as it comes. What compiling takes
            is left out: a first generation is not measured.
    """
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    if compiled:
        settings["cache_implementation"] = "static"
    for _ in range(2):
        stamps = _Stamps()
        found = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), streamer=stamps, **settings)
    assert len(stamps.times) == new_tokens + 1, "an answer ended early"
    return stamps.times, found


def seconds_a_token(model: PreTrainedModel, prompt: int, *, compiled: bool) -> float:
    """Median time between two tokens of ``generate`` after a prompt, one row; see :func:`token_times`."""
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=model.device)
    times, _ = token_times(model, ids, compiled=compiled, new_tokens=_TOKENS)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(gaps[_SETTLING:])
