"""Steps of decoding as benchmarks time them: models with random weights, and one pass over a few tokens.

Random weights cost what trained ones do. What a pass reads of keys, values and states is in place before it: slots are
set to a length, not read up to it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mambify.bench.clock import device_seconds_of, seconds_of
from mambify.bench.shapes import model_of_shape
from mambify.engine.recording import recorded
from mambify.engine.tower import Tower
from mambify.model import HybridForCausalLM
from mambify.trimmed_head import TrimmedHead

_MOST_TOKENS = 131_072


def drawn_model(shape: str, device: str, *, words: int | None = None, **config: Any) -> HybridForCausalLM:
    """A model of a named shape with random weights, in bfloat16 on a GPU.

    Args:
        words: tokens that its head knows, the first ones; all by default.
        config: see :func:`mambify.bench.shapes.config_of_shape`.
    """
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    model = model_of_shape(shape, device, dtype, seed=0, **{"max_position_embeddings": _MOST_TOKENS} | config)
    if words is not None:  # which of them does not matter to what it costs
        facts = model.config
        facts.draft_vocabulary = words
        model.lm_head = TrimmedHead(facts.hidden_size, facts.vocab_size, words).to(device, dtype)
        torch.arange(words, out=model.lm_head.token_ids)
    return model


def read_weight_bytes(model: HybridForCausalLM) -> int:
    """Bytes of the weights that every pass reads: all but the embeddings, of which a pass looks up a few rows.

    Embeddings that are the head as well are read as such.
    """
    read = {id(weight): weight.nbytes for name, weight in model.named_parameters() if "embed_tokens" not in name}
    read |= {id(weight): weight.nbytes for weight in model.lm_head.parameters()}
    return sum(read.values())


@torch.inference_mode()
def pass_of(model: HybridForCausalLM, *, slots: int, new: int, context: int) -> Callable[[], object]:
    """One pass of ``new`` tokens in each of ``slots`` slots that hold ``context`` tokens; recorded on a GPU.

    Nothing is kept of it, so it can be repeated.
    """
    active_S = torch.ones(slots, dtype=torch.bool, device=model.device)
    tower = Tower(model, num_slots=slots, length=context + new, most_new=new, active_S=active_S, final=new == 1)
    tower.length_S.fill_(context)
    token_ST = torch.randint(model.config.vocab_size, (slots, new), device=model.device)

    @torch.inference_mode()
    def run() -> object:
        return tower.read(token_ST)

    return recorded(run, model.device)


def pass_seconds(model: HybridForCausalLM, *, slots: int, new: int, context: int) -> float:
    """Time of one pass of ``new`` tokens in each slot; see :func:`pass_of`."""
    seconds = seconds_of(pass_of(model, slots=slots, new=new, context=context), str(model.device))
    forget(str(model.device))
    return seconds


def read_bandwidth(device: str, rows: int = 1) -> float:
    """Bytes of weights a second that a chain of recorded linear layers reads, each with weights of its own.

    In one graph on a GPU, and more weights than any cache holds: the bound of decoding ``rows`` tokens at once.
    """
    on_gpu = torch.device(device).type == "cuda"
    wide, narrow, pairs = (14_336, 4096, 8) if on_gpu else (1024, 512, 8)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    weights = [torch.randn(s, device=device, dtype=dtype) / 64 for s in ((wide, narrow), (narrow, wide)) * pairs]
    x = torch.randn(rows, narrow, device=device, dtype=dtype)

    def chain() -> Tensor:
        y = x
        for weight in weights:
            y = F.linear(y, weight)
        return y

    with torch.inference_mode():
        seconds = device_seconds_of(chain, device)
    found = sum(weight.nbytes for weight in weights) / seconds
    weights.clear()
    forget(device)
    return found


def forget(device: str) -> None:
    """Gives memory that nothing refers to any more back."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
