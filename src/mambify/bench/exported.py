"""``mambify bench export``: transformers' ``generate`` of an exported student beside our own decoding of the student.

Both have the same weights, in memory at once: the stock class with what ``mambify export`` writes (heads cut so that
the kernels take them), and the model it is written from. Their logits are compared first; there is no time for a stock
model that is another function, as it is in transformers before 5.23. Then both answer the same prompts greedily.

Which code the stock mixer runs is read off transformers itself, function by function: where the packages mamba-ssm and
causal-conv1d are missing, it is torch code, and the rows say so. Only where all of it is kernels they say "kernels".

``ms`` is the time of a step, once prompts were read; ``whole_ms`` that of the whole answer, prompts included;
``same_tokens`` how much of an answer of ours is transformers' (random weights in bfloat16 part early: all words are
about as likely).
"""

from __future__ import annotations

import inspect
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as stock_code

from mambify.bench.decode_peers import token_times
from mambify.bench.decode_steps import drawn_model, forget
from mambify.bench.pace import pace_of
from mambify.bench.sheet import Row, Sheet, failure
from mambify.config import HybridConfig
from mambify.engine import Sampling, Speculator
from mambify.errors import MambifyError
from mambify.export.granite_config import MINIMUM_TRANSFORMERS, granite_config, granite_layout
from mambify.export.transformers import stock_weights
from mambify.families.load import load
from mambify.model import HybridForCausalLM

#: what the stock mixer calls while it generates
FUNCTIONS = ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba2_selective_state_update")
KERNELS, IN_PART, TORCH = "kernels", "kernels in part", "torch code"
OURS, GENERATE, COMPILED = "ours", "generate", "generate, compiled"
_NEW, _SETTLING = 64, 8  # tokens of an answer; of these before times count
_COMPARED = 64  # tokens whose logits are compared
_FARTHEST = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # mean difference of logits over their spread, rounding alone
_HEADS = 8  # causal-conv1d takes mixers of a multiple of so many heads


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        part: the model's size, or "compiled"; a part can be asked for alone.
        batch, context: prompts, and tokens of each.
        way: "ours", or transformers' "generate" as it comes, or with a static cache, for which it compiles the model.
    """

    part: str
    shape: str
    batch: int
    context: int
    way: str


def _cases(shape: str) -> Iterator[Case]:
    for batch in (1, 32):
        for context in (256, 4096):
            yield from (Case(shape, shape, batch, context, way) for way in (GENERATE, OURS))
    yield from (Case("compiled", shape, batch, 256, COMPILED) for batch in (1, 32))


_TARGET = "target"
CASES: dict[str, list[Case]] = {
    "cpu": [Case("tiny", "tiny", batch, 16, way) for batch in (1, 2) for way in (GENERATE, OURS)],
    "cuda": [*_cases("135M"), *_cases("8B")],
}


def run(device: str, sheet: Sheet, only: str | None = None, target: str | None = None) -> None:
    """Measures all parts, or those that ``only`` names, with commas between them.

    Args:
        target: a student, in place of those of random weights.
    """
    kind = torch.device(device).type
    parts = None if only is None else only.split(",")
    cases = CASES[kind]
    if target is not None:
        first = cases[0].shape
        cases = [
            replace(case, shape=_TARGET, part=case.part.replace(first, _TARGET))
            for case in cases
            if case.shape == first
        ]
    cases = [case for case in cases if parts is None or case.part in parts]
    used = kernels_in_use()
    sheet.facts["kernels"] = used
    pair: _Pair | None = None

    def about(case: Case) -> Row:
        row = asdict(case) | {"model": target or f"{case.shape}, random weights"}
        return row if case.way == OURS else row | {"code": code_of(used)}

    def measure(case: Case) -> Row:
        nonlocal pair
        if pair is None or pair.shape != case.shape:
            pair = None
            forget(device)
            pair = _Pair.of(case.shape, device, target)
        return pair.measure(case)

    sheet.fill(cases, measure, about=about, theirs=lambda case: case.way != OURS)


def kernels_in_use() -> dict[str, str | None]:
    """Function of the stock mixer → module of the kernel that transformers calls for it; None: its own torch code."""
    found: dict[str, str | None] = {}
    for name in FUNCTIONS:
        # transformers keeps what it chose when it was imported in its wrapper's closure, and tells nobody else.
        chosen = inspect.getclosurevars(getattr(stock_code, name)).nonlocals.get("implementation")
        module = getattr(chosen, "__module__", None) or ""
        found[name] = None if not module or module.startswith("transformers.") else module
    return found


def code_of(used: dict[str, str | None]) -> str:
    """What the stock mixer is to be called: "kernels" only where nothing of it is torch code."""
    if all(used.values()):
        return KERNELS
    return IN_PART if any(used.values()) else TORCH


def split_for_kernels(config: HybridConfig) -> int:
    """Into how many heads each of the mixer's has to be cut for causal-conv1d: ``--split-heads``."""
    heads = granite_layout(config).stock_heads
    assert config.head_dim
    return next(n for n in range(1, config.head_dim + 1) if config.head_dim % n == 0 and heads * n % _HEADS == 0)


@torch.no_grad()
def stock_of(student: HybridForCausalLM, *, split: int) -> GraniteMoeHybridForCausalLM:
    """The stock model that transformers loads from an export of ``student``, on the same device, in the same dtype."""
    layout = granite_layout(student.config, split=split)
    facts = granite_config(student.config, layout, dtype=str(student.dtype).removeprefix("torch."))
    before = torch.get_default_dtype()
    torch.set_default_dtype(student.dtype)
    try:
        with student.device:
            stock = GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**facts)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    places = dict(stock.named_parameters())
    for name, weight in stock_weights(student, layout):
        places.pop(name).copy_(weight)
    assert not places, f"not in an export: {', '.join(places)}"
    return stock


class _Pair:
    """A student and its export."""

    def __init__(self, shape: str, ours: HybridForCausalLM) -> None:
        self.shape, self._ours, self._device = shape, ours, str(ours.device)
        self._split = split_for_kernels(ours.config)
        self._stock = stock_of(ours, split=self._split)
        self._apart = self._difference()
        self._answers: dict[tuple[int, int], list[list[int]]] = {}  # transformers', by batch and context

    @classmethod
    def of(cls, shape: str, device: str, target: str | None) -> _Pair:
        if target is None:
            return cls(shape, drawn_model(shape, device, attention=0.5))
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        return cls(shape, load(target, dtype=dtype, device=device, with_tokenizer=False).model)

    def measure(self, case: Case) -> Row:
        if case.way != OURS:
            self._require_same_function()
        prompts_BT = self._prompts(case)
        on_gpu = torch.device(self._device).type == "cuda"
        held = 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
            held = torch.cuda.memory_allocated(self._device)
        if case.way == OURS:
            found = self._ours_found(prompts_BT)
        else:
            found = self._stock_found(prompts_BT, compiled=case.way == COMPILED)
        if on_gpu:
            found["working_bytes"] = torch.cuda.max_memory_allocated(self._device) - held
        return found | {"tokens_per_second": 1e3 * case.batch / found["ms"]}

    def _require_same_function(self) -> None:
        if "group_size" not in inspect.signature(stock_code.GraniteMoeHybridRMSNormGated).parameters:
            raise MambifyError(f"the mixer of transformers before {MINIMUM_TRANSFORMERS} is another function")
        if self._apart > _FARTHEST[self._ours.dtype]:
            raise MambifyError(
                f"logits are {self._apart:.3f} of their spread apart from ours: this is another function"
            )

    def _stock_found(self, prompts_BT: Tensor, *, compiled: bool) -> Row:
        times, found_BT = token_times(self._stock, prompts_BT, compiled=compiled, new_tokens=_NEW)
        B, T = prompts_BT.shape
        if not compiled:
            self._answers[B, T] = found_BT[:, T:].tolist()
        gaps = [after - before for before, after in itertools.pairwise(times[1:])]
        return {
            "ms": 1e3 * statistics.median(gaps[_SETTLING:]),
            "whole_ms": 1e3 * (times[-1] - times[0]),
            "weight_bytes": sum(weight.nbytes for weight in self._stock.parameters()),
            "split_heads": self._split,
            "logits_apart": self._apart,
        }

    def _ours_found(self, prompts_BT: Tensor) -> Row:
        B, T = prompts_BT.shape
        engine = Speculator(self._ours, None, num_slots=B, max_length=T + _NEW, sampling=Sampling(temperature=0.0))
        for _ in range(2):  # the first time kernels are compiled
            began = time.perf_counter()
            pace = pace_of(engine, prompts_BT.tolist(), max_new_tokens=_NEW)
            whole = time.perf_counter() - began
        found = {
            "ms": 1e3 * pace.seconds / pace.rounds,
            "whole_ms": 1e3 * whole,
            "weight_bytes": sum(weight.nbytes for weight in self._ours.parameters()),
        }
        theirs = self._answers.get((B, T))
        return found if theirs is None else found | {"same_tokens": _same(pace.answers, theirs)}

    def _prompts(self, case: Case) -> Tensor:
        generator = torch.Generator().manual_seed(case.context)
        vocabulary = self._ours.config.vocab_size
        return torch.randint(3, vocabulary, (case.batch, case.context), generator=generator).to(self._device)

    @torch.inference_mode()
    def _difference(self) -> float:
        """Mean difference of the logits of both over their standard deviation."""
        tokens_BT = self._prompts(Case("", "", 1, _COMPARED, ""))
        ours, theirs = (model(tokens_BT, use_cache=False).logits.float() for model in (self._ours, self._stock))
        return float((ours - theirs).abs().mean() / ours.std())


def _same(answers: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Mean share of an answer that comes before it parts from the other one."""
    shares = []
    for answer, other in zip(answers, others, strict=True):
        parts = (at for at, (one, two) in enumerate(zip(answer, other, strict=True)) if one != two)
        shares.append(next(parts, len(other)) / len(other))
    return statistics.mean(shares)


def table(result: dict[str, Any]) -> Table:
    """The rows of :func:`run` for people."""
    torch_code = [name for name, module in result["kernels"].items() if module is None]
    shown = Table(
        title=f"{result['machine']['device']}, transformers {result['machine']['transformers']}",
        caption=f"transformers runs its own torch code for {', '.join(torch_code)}" if torch_code else None,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    for heading in ("model", "way"):
        shown.add_column(heading)
    for heading in ("batch", "context", "ms a step", "tokens/s", "× generate", "whole answer, ms", "beside weights"):
        shown.add_column(heading, justify="right")
    plain = {
        (row["model"], row["batch"], row["context"]): row["ms"]
        for row in result["results"]
        if row["way"] == GENERATE and "ms" in row
    }
    for row in result["results"]:
        way = f"{row['way']} ({row['code']})" if "code" in row else row["way"]
        start = [row["model"], way, str(row["batch"]), f"{row['context']:,}"]
        if "error" in row:
            shown.add_row(*start, failure(row))
            continue
        first = plain.get((row["model"], row["batch"], row["context"]))
        times = f"{first / row['ms']:.2f}" if first else ""
        beside = f"{row['working_bytes'] / 1e9:.2f} GB" if "working_bytes" in row else ""
        shown.add_row(
            *start, f"{row['ms']:.2f}", f"{row['tokens_per_second']:,.1f}", times, f"{row['whole_ms']:,.0f}", beside
        )
    return shown
