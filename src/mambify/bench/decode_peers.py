"""Decoding as others do it, for ``mambify bench decode`` and ``export``.

transformers' ``generate``, eager or with a static cache; and a loop in the style of gpt-fast, in our own words around
transformers' Llama.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

_TOKENS, _SETTLING = 24, 6  # of a measured generation; tokens of it before times count
_TEMPERATURE, _TOP_K = 0.8, 200  # of the loop; gpt-fast's own
#: what ``mode="reduce-overhead"`` stands for, and gpt-fast's search for the blocks of products
_COMPILED: dict[str, Any] = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}


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


@torch.no_grad()
def seconds_a_token_in_a_loop(model: LlamaForCausalLM, prompt: int) -> float:
    """Mean time of a token of a gpt-fast-style loop after a prompt, one row.

    A step is one compiled graph without breaks: the whole forward over a static cache, and the drawing of the token on
    the device. The host calls it again and again and waits for nothing but the last one. Compiling, and the first
    steps, in which CUDA graphs are recorded, are left out.
    """
    device = model.device
    cache = StaticCache(config=model.config, max_cache_len=prompt + _SETTLING + _TOKENS)
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=device)
    token_11 = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    position_11 = torch.full_like(token_11, prompt)

    def step(token_11: Tensor, position_11: Tensor, cache: StaticCache) -> Tensor:
        logits_1V: Tensor = model(token_11, position_ids=position_11, past_key_values=cache).logits[:, -1]
        logits_1V = logits_1V / _TEMPERATURE
        least_11 = logits_1V.topk(min(_TOP_K, logits_1V.shape[1])).values[:, -1:]
        chance_1V = logits_1V.masked_fill(logits_1V < least_11, -torch.inf).softmax(-1)
        return (chance_1V / torch.empty_like(chance_1V).exponential_(1)).argmax(-1, keepdim=True)

    compiled = torch.compile(step, fullgraph=True, options=_COMPILED)

    def go_on(count: int) -> None:
        nonlocal token_11
        for _ in range(count):
            token_11 = compiled(token_11, position_11, cache).clone()  # the next replay writes over what it returns
            position_11.add_(1)
        token_11.item()

    go_on(_SETTLING)
    start = time.perf_counter()
    go_on(_TOKENS)
    return (time.perf_counter() - start) / _TOKENS
