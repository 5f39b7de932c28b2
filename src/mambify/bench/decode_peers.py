"""transformers' own decoding of a Transformer of random weights, for ``mambify bench decode``."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
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


def seconds_a_token(model: LlamaForCausalLM, prompt: int, *, compiled: bool) -> float:
    """Median time between two tokens of ``generate`` after a prompt, greedy, one row.

    Args:
        compiled: with a static cache, for which transformers compiles the model; else as it comes. What compiling takes
            is left out: a first generation is not measured.
    """
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=model.device)
    settings: dict[str, Any] = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False}
    if compiled:
        settings["cache_implementation"] = "static"
    stamps = _Stamps()
    for _ in range(2):
        stamps = _Stamps()
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stamps, **settings)
    gaps = [after - before for before, after in zip(stamps.times, stamps.times[1:], strict=False)]
    return statistics.median(gaps[_SETTLING:])
