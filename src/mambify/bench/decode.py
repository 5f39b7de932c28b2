"""``mambify bench decode``: what one more token costs, beside reading the weights and what others make of it.

Models have random weights, which cost the same as trained ones, drawn on the device. Where a text is said to be there
already, buffers are filled at random and lengths set: nothing is read to get there. A step is a round of the engine:
one read of a token, one drawn, all of its bookkeeping.

The bound is the bytes of all weights that a token needs (embeddings aside) over the bandwidth at which recorded linear
layers of 14,336 × 4,096 read theirs, measured in the same run. Steps of many slots read states, keys and values too;
``of_bandwidth`` counts these, ``of_bound`` the weights alone.

What fails says so in its row, and the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from mambify.bench.clock import seconds_of
from mambify.bench.decode_linears import linears_of, read_rates
from mambify.bench.decode_peers import llama, seconds_a_token, seconds_a_token_in_a_loop
from mambify.bench.decode_steps import drawn_model, forget, read_bandwidth, read_weight_bytes
from mambify.bench.shapes import SHAPES
from mambify.bench.sheet import Row, Sheet, failure
from mambify.conversion import state_bytes
from mambify.distill.arguments import use_bfloat16
from mambify.engine import Sampling, Speculator, memory
from mambify.engine.recording import recorded
from mambify.engine.tower import Tower
from mambify.model import HybridForCausalLM

_ROUNDS = 32  # of which one folds what is pending into the states, where rings are used: one in 31 does in the long run
_CHUNK = 4096  # tokens of the throughput that is integrated


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        part: what it belongs to; a part can be asked for alone.
        attention: share of layers that keep attention, the others are Mamba2.
        batch: slots.
        context: tokens that each slot holds already.
        tokens: read at once.
        way: of our own engine "fused" or "modules", with "overlap" before it where kernels overlap; or transformers'
            "eager" or "compiled", or a "gpt-fast-style loop" around its model; or the name of a linear layer, which
            ``linears`` has by every kernel and ``tiles`` by each with other sizes.
    """

    part: str
    shape: str
    attention: float = 0.5
    batch: int = 1
    context: int = 512
    tokens: int = 1
    way: str = "fused"


def _cuda_cases() -> Iterator[Case]:
    for shape in ("8B", "135M", "mamba-7b"):
        yield from (Case("linears", shape, tokens=rows, way=way) for way in linears_of(shape) for rows in (1, 3, 5, 8))
    yield from (Case("tiles", "8B", tokens=rows, way=way) for way in linears_of("8B") for rows in (5, 16))
    yield from (Case("tiles", "135M", tokens=rows, way=way) for way in linears_of("135M") for rows in (1, 3, 5, 9))
    big = Case("step", "8B")
    yield from (replace(big, way=way) for way in ("fused", "overlap fused", "modules"))
    yield from (replace(big, attention=share, way=way) for share in (1.0, 0.25, 0.0) for way in _OURS)
    for shape in ("3B", "135M"):
        yield from (Case("step", shape, share, way=way) for share in (1.0, 0.5, 0.25, 0.0) for way in _OURS)
    yield from (Case("verify", "8B", tokens=tokens) for tokens in (1, 5, 2, 3, 8))
    yield from (Case("verify", "8B", tokens=tokens, way="overlap fused") for tokens in (1, 5))
    yield from (Case("verify", "8B", 0.5, 64, tokens=tokens) for tokens in (1, 5))
    small = (("135M", 0.5), ("mamba-2.8b", 0.0), ("mamba-7b", 0.0))
    yield from (Case("verify", shape, share, tokens=tokens) for shape, share in small for tokens in (1, 3, 4, 5, 8))
    for part, way in _PEERS.items():
        for context in (64, 16_384):
            yield Case(f"{part}-16k" if context > 64 else part, "8B", 1.0, context=context, way=way)
    yield from (Case("batch", "8B", share, 2**n) for share in (0.5, 1.0) for n in range(0, 10, 1))
    for share in (0.5, 0.0, 1.0):
        yield from (Case("context", "8B", share, context=1024 * 2**n) for n in (0, 2, 4, 5, 6, 7))
    yield from (Case("throughput", "3B", share, batch=0, context=_CHUNK) for share in (1.0, 0.5, 0.25, 0.0))


_OURS = ("fused", "overlap fused")
#: part → way
_PEERS = {"eager": "eager", "compiled": "compiled", "loop": "gpt-fast-style loop"}
CASES: dict[str, list[Case]] = {
    "cpu": [
        *(Case("linears", "tiny", tokens=rows, way=way) for way in ("q, k, v", "gate, up", "down") for rows in (1, 5)),
        Case("linears", "mamba-tiny", tokens=3, way="x_proj"),
        Case("tiles", "tiny", tokens=5, way="down"),
        *(
            Case("step", "tiny", share, way=way, context=16)
            for share in (1.0, 0.5, 0.0)
            for way in ("fused", "modules")
        ),
        *(Case("verify", "tiny", batch=batch, tokens=tokens, context=16) for batch in (1, 4) for tokens in (1, 5)),
        *(Case(part, "tiny", 1.0, context=16, way=way) for part, way in _PEERS.items()),
        *(Case("batch", "tiny", batch=batch, context=16) for batch in (1, 4)),
        *(Case("context", "tiny", share, context=context) for share in (0.0, 0.5) for context in (16, 256)),
        *(Case("throughput", "tiny", share, batch=4, context=64) for share in (1.0, 0.5)),
    ],
    "cuda": list(_cuda_cases()),
}


def run(device: str, sheet: Sheet, only: str | None = None) -> None:
    """Measures all parts, or those that ``only`` names, with commas between them; the bound in any case."""
    on_gpu = torch.device(device).type == "cuda"
    parts = None if only is None else only.split(",")
    cases = [case for case in CASES["cuda" if on_gpu else "cpu"] if parts is None or case.part in parts]
    if not cases:
        return
    bound = {f"M={rows}": read_bandwidth(device, rows) for rows in (1, 5)}
    sheet.facts["read_bytes_per_second"] = bound
    sheet.fill(cases, _Machine(device, bound["M=1"]).measure, theirs=lambda case: case.way in _PEERS.values())


class _Machine:
    """Measures cases one after another, and keeps the model of the last one."""

    def __init__(self, device: str, bandwidth: float) -> None:
        self._device, self._bandwidth = device, bandwidth
        self._model: HybridForCausalLM | None = None
        self._key: tuple[str, float] | None = None
        self._plain: dict[tuple[str, int, str], float] = {}  # (shape, batch, way) → seconds of the read of one token

    def forget(self) -> None:
        self._model, self._key = None, None

    def measure(self, case: Case) -> Row:
        try:
            return self._found(case)
        except Exception:
            self.forget()  # a small memory may be why: the next case begins with an empty one
            raise

    def _found(self, case: Case) -> Row:
        if case.part in ("linears", "tiles"):
            self.forget()
            forget(self._device)
            linear, dtype = linears_of(case.shape)[case.way], _dtype(self._device)
            rates = read_rates(linear, case.tokens, self._device, dtype, tiles=case.part == "tiles")
            return {"read_bytes_per_second": rates}
        if case.way in _PEERS.values():
            self.forget()
            forget(self._device)
            return self._figures(_peer_seconds(case, self._device), case)
        model = self._of(case)
        weights = read_weight_bytes(model)
        if case.part == "throughput":
            return self._throughput(model, case)
        if case.part == "verify":
            seconds, carried = read_seconds(model, case, self._device)
            key = case.shape, case.batch, case.way
            if case.tokens == 1:
                self._plain[key] = seconds
            found = self._figures(seconds, case, weights, carried)
            return found | {"of_one_step": seconds / self._plain[key] if key in self._plain else None}
        seconds, carried = step_seconds(model, case, self._device)
        return self._figures(seconds, case, weights, carried)

    def _of(self, case: Case) -> HybridForCausalLM:
        key = case.shape, case.attention
        if self._key != key or self._model is None:
            self.forget()
            forget(self._device)
            self._model, self._key = drawn_model(case.shape, self._device, attention=case.attention), key
        return self._model

    def _figures(self, seconds: float, case: Case, weights: int | None = None, carried: int | None = None) -> Row:
        """``carried``: bytes that one slot carries at this context, which a step reads."""
        found: Row = {"ms": 1e3 * seconds, "tokens_per_second": case.batch * case.tokens / seconds}
        if weights is not None and carried is not None:
            bound = weights / self._bandwidth
            moved = (weights + case.batch * carried) / self._bandwidth
            found |= {
                "weight_bytes": weights, "carried_bytes": carried, "bound_ms": 1e3 * bound,
                "of_bound": bound / seconds, "of_bandwidth": moved / seconds,
            }  # fmt: skip
        return found

    def _throughput(self, model: HybridForCausalLM, case: Case) -> Row:
        """Tokens a second of as many slots as fit, each from its first token to the last that is reserved for it."""
        batch = case.batch or most_slots(model, case.context, self._device)
        contexts = [round(share * (case.context - _ROUNDS - 2)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
        times = [
            step_seconds(model, replace(case, batch=batch, context=context), self._device, length=case.context)
            for context in contexts
        ]
        seconds = [time for time, _ in times]
        spans = zip(seconds, seconds[1:], contexts, contexts[1:], strict=False)
        whole = sum((before + after) / 2 * (end - start) for before, after, start, end in spans)
        return {
            "batch": batch,
            "ms": 1e3 * whole / contexts[-1],
            "ms_at": {context: 1e3 * time for context, time in zip(contexts, seconds, strict=True)},
            "tokens_per_second": batch * contexts[-1] / whole,
            "carried_bytes": times[-1][1],
        }


def step_seconds(model: HybridForCausalLM, case: Case, device: str, length: int | None = None) -> tuple[float, int]:
    """Mean time of a round from ``case.context`` tokens on, and the bytes one slot carries there.

    Args:
        length: of the slots; by default as short as will do.
    """
    length = length or case.context + _ROUNDS + 2
    speculator = Speculator(
        model,
        None,
        num_slots=case.batch,
        max_length=length,
        sampling=Sampling(temperature=0.0),
        backend=case.way.split()[-1],
        overlap=case.way.startswith("overlap"),
    )
    tower = speculator.target
    step = speculator.pretend(case.context)

    def rounds() -> None:
        tower.rewind(case.context)
        for _ in range(_ROUNDS):
            step()

    with torch.inference_mode():
        return seconds_of(rounds, device) / _ROUNDS, carried_at(model, case.context)


def read_seconds(model: HybridForCausalLM, case: Case, device: str) -> tuple[float, int]:
    """Mean time of the read of ``case.tokens`` tokens, more than half of which then stand; and bytes as above."""
    kept, T = case.tokens // 2 + 1, case.tokens
    with torch.inference_mode():
        active_S = torch.ones(case.batch, dtype=torch.bool, device=device)
        tower = Tower(
            model,
            num_slots=case.batch,
            length=case.context + (_ROUNDS + 1) * kept + T,
            most_new=T,
            active_S=active_S,
            final=T == 1,
            backend=case.way.split()[-1],
            overlap=case.way.startswith("overlap"),
        )
        tower.pretend(case.context)
        token_ST = torch.ones(case.batch, T, dtype=torch.long, device=device)
        count_S = torch.full_like(token_ST[:, 0], kept)

        def once() -> None:
            tower.read(token_ST)
            tower.keep(count_S, T)

        step = recorded(once, device)

        def rounds() -> None:
            tower.rewind(case.context)
            for _ in range(_ROUNDS):
                step()

        return seconds_of(rounds, device) / _ROUNDS, carried_at(model, case.context)


def carried_at(model: HybridForCausalLM, context: int) -> int:
    """Bytes of keys, values and states that the next token of a sequence of ``context`` tokens reads."""
    return state_bytes(model.config, context)


def most_slots(model: HybridForCausalLM, length: int, device: str) -> int:
    """Slots of ``length`` tokens that fit the free memory, a multiple of 8."""
    forget(device)
    free, _ = torch.cuda.mem_get_info(device)
    return max(8, memory.most_slots([model], length=length, most_new=1, free=free) // 8 * 8)


def _peer_seconds(case: Case, device: str) -> float:
    s = SHAPES[case.shape]
    model = llama(
        device, _dtype(device), vocab_size=s.vocabulary, hidden_size=s.hidden, intermediate_size=s.intermediate,
        num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.groups, head_dim=s.head_dim,
        tie_word_embeddings=s.tied, max_position_embeddings=131_072,
    )  # fmt: skip
    if case.way == _PEERS["loop"]:
        return seconds_a_token_in_a_loop(model, case.context)
    return seconds_a_token(model, case.context, compiled=case.way == "compiled")


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if use_bfloat16("auto", torch.device(device).type) else torch.float32


def table(result: dict[str, Any]) -> Table:
    """The rows of :func:`run` for people."""
    read = ", ".join(f"{name} {rate / 1e12:.2f} TB/s" for name, rate in result["read_bytes_per_second"].items())
    shown = Table(
        title=f"{result['machine']['device']}; recorded linear layers read {read}",
        caption="of bound: reading the weights alone; of bandwidth: states, keys and values too; linears: TB/s",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    for heading in ("part", "shape", "attention", "way"):
        shown.add_column(heading)
    for heading in (
        "batch", "context", "tokens", "ms", "tokens/s", "of bound", "of bandwidth", "of one step", "carried",
    ):  # fmt: skip
        shown.add_column(heading, justify="right")
    for row in result["results"]:
        start = [row["part"], row["shape"], f"{row['attention']:.0%}", row["way"], str(row["batch"])]
        start += [f"{row['context']:,}", str(row["tokens"])]
        if "error" in row:
            shown.add_row(*start, failure(row))
            continue
        if "read_bytes_per_second" in row:
            rates = row["read_bytes_per_second"].items()
            shown.add_row(
                *start, ", ".join(f"{n} {v / 1e12:.2f}" if isinstance(v, float) else n + " failed" for n, v in rates)
            )
            continue
        carried = f"{row['carried_bytes'] / 1e6:.1f} MB" if "carried_bytes" in row else ""
        shares = [f"{row[key]:.1%}" if row.get(key) else "" for key in ("of_bound", "of_bandwidth")]
        again = f"{row['of_one_step']:.2f}" if row.get("of_one_step") else ""
        shown.add_row(*start, f"{row['ms']:.3f}", f"{row['tokens_per_second']:,.1f}", *shares, again, carried)
    return shown
