"""``mambify bench synthesize``: text sampled from the embedded teacher, in tokens a second.

Three ways to the same kind of text: the decode engine (slots that are refilled), a batch at a time through
transformers' dynamic cache (what a CPU uses), and transformers' own ``generate``. Prompts and limits are those of
``mambify synthesize``; every token that ends up in a document counts, given or drawn. Loading the teacher and making
the engine are left out, writing files too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from mambify.bench.sheet import Row, Sheet, failure
from mambify.data.sampler import Sampler, Settings
from mambify.families.load import load, require_tokenizer
from mambify.model import HybridForCausalLM

_TOP_K = 50


@dataclass(frozen=True)
class Case:
    """One way, at one batch size.

    Attributes:
        rows: documents to sample.
    """

    way: str
    batch: int
    rows: int
    max_new_tokens: int = 256


CASES = {
    "cpu": [Case("batches", 8, 8, 16), Case("slots", 8, 8, 16), Case("generate", 8, 8, 16)],
    "cuda": [
        *(Case("slots", size, 6 * size) for size in (256, 1024, 2048)),
        Case("batches", 512, 512),
        Case("generate", 1024, 1024),
    ],
}


def run(device: str, sheet: Sheet, only: str | None = None) -> None:
    """Samples with every case, or with one way."""
    cases = [case for case in CASES[torch.device(device).type] if only in (None, case.way)]
    on_gpu = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    loaded = load("smollm2", dtype=dtype, device=device)
    tokenizer = require_tokenizer(loaded)
    sheet.facts |= {"teacher": "smollm2", "top_k": _TOP_K}

    def measure(case: Case) -> Row:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        tokens, seconds = _WAYS[case.way](case, loaded.model, tokenizer)
        memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
        return {"tokens": tokens, "seconds": seconds, "peak_bytes": memory, "tokens_per_second": tokens / seconds}

    sheet.fill(cases, measure)


def table(result: dict[str, Any]) -> Table:
    """The rows of :func:`run` for people."""
    shown = Table(title=result["machine"]["device"], title_justify="left", box=SIMPLE, pad_edge=False)
    for heading in ("way", "at once", "documents", "tokens", "seconds", "tokens/s", "peak memory"):
        shown.add_column(heading, justify="left" if heading == "way" else "right")
    for row in result["results"]:
        if "error" in row:
            shown.add_row(row["way"], f"{row['batch']}", f"{row['rows']}", failure(row))
            continue
        memory = f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else ""
        shown.add_row(
            row["way"], f"{row['batch']}", f"{row['rows']}", f"{row['tokens']:,}", f"{row['seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}", memory,
        )  # fmt: skip
    return shown


def _by_sampler(case: Case, model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase) -> tuple[int, float]:
    settings = Settings(
        1, "chat", top_k=_TOP_K, max_new_tokens=case.max_new_tokens, max_user_tokens=128, batch_size=case.batch
    )
    sampler = Sampler(model, tokenizer, settings)
    sampler.in_slots = case.way == "slots"
    if sampler.in_slots:
        assert sampler.engine is not None  # made and recorded before the clock starts
    torch.manual_seed(0)
    start = time.perf_counter()
    documents = sampler.sample("chat", case.rows)
    return sum(map(len, documents)), time.perf_counter() - start


def _by_generate(case: Case, model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase) -> tuple[int, float]:
    """Questions only, each row up to its end: the first half of what the other ways do."""
    settings = Settings(1, "chat", top_k=_TOP_K, max_new_tokens=case.max_new_tokens, batch_size=case.batch)
    sampler = Sampler(model, tokenizer, settings)
    assert sampler.format is not None
    prompt = torch.tensor([sampler.format.before_user] * case.rows, device=model.device)
    stops = sorted(sampler.stops)
    torch.manual_seed(0)
    start = time.perf_counter()
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=_TOP_K,
        max_new_tokens=case.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    drawn = ids[:, prompt.shape[1] :]
    ended = torch.isin(drawn, torch.tensor(stops, device=drawn.device)).long()
    lengths = ((ended.cumsum(1) - ended) == 0).sum(1)  # the token that ends a row is its last
    return int(lengths.sum()) + prompt.numel(), time.perf_counter() - start


_WAYS: dict[str, Callable[[Case, HybridForCausalLM, PreTrainedTokenizerBase], tuple[int, float]]] = {
    "slots": _by_sampler,
    "batches": _by_sampler,
    "generate": _by_generate,
}
