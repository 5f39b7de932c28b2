"""``mambify bench verify``: what it costs to read drafted tokens that may yet be rejected.

Layers: replay from a state that stays where it is, beside the ways it replaces: a state stored for every token (as vLLM
does), and verification on a copy with the accepted tokens recomputed. Layers of a model follow each other with states
that no cache holds; here, too, as many layers are timed in a row as exceed the second-level cache. A round of replay is
the mean over rounds: one in several also takes the state over what is pending.

Passes: the whole model over T tokens beside one plain step of it.

Letters: S rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from mambify.bench.case import Case as LayerCase
from mambify.bench.case import Operation, Shape
from mambify.bench.clock import copy_bandwidth, device_seconds_of
from mambify.bench.decode_steps import drawn_model, forget, pass_seconds
from mambify.bench.ops import TOLERANCE, largest_difference
from mambify.bench.replay_cases import selective_replay_case, ssd_replay_case
from mambify.bench.sheet import Row, Sheet, failure
from mambify.evaluate.report.quantities import significant
from mambify.ops.ring import RingPlace, ring_capacity

#: bytes of states that are timed in a row: several times what a second-level cache holds
_COLD_BYTES = {"cpu": 2**16, "cuda": 2**28}
_MOST_LAYERS = 256
_CHECKED_ROWS = 8  # more are not held against the reference: it would take gigabytes
_MAKERS: dict[str, Callable[..., LayerCase]] = {"mamba2": ssd_replay_case, "mamba1": selective_replay_case}
REPLAY = "replay"


@dataclass(frozen=True)
class Case:
    """One layer, or one model, over T tokens of each of S rows.

    Attributes:
        part: what ``only`` chooses by.
        context: tokens that rows hold already; of models alone.
    """

    part: str
    shape: str
    S: int
    T: int
    mixer: str = "mamba2"
    context: int = 0


#: H, G, P of a layer
_LAYERS = {"tiny": (4, 2, 16), "8B": (32, 8, 128)}
_BATCHES = (1, 8, 64, 256, 512)
CASES: dict[str, list[Case]] = {
    "cpu": [
        *(Case("batch", "tiny", rows, 3) for rows in (1, 4)),
        Case("tokens", "tiny", 2, 5),
        Case("mamba1", "tiny", 2, 3, "mamba1"),
        *(Case("pass", "tiny", 2, new, context=16) for new in (3, 5)),
    ],
    "cuda": [
        *(Case("batch", "8B", rows, 5) for rows in _BATCHES),
        *(Case("tokens", "8B", rows, new) for rows in (1, 64) for new in (2, 3, 9, 17)),
        *(Case("mamba1", "8B", rows, 5, "mamba1") for rows in _BATCHES),
        *(Case("pass", "8B", rows, 5, context=1024) for rows in (1, 8, 64)),
        *(Case("pass", "8B", 1, new, context=1024) for new in (2, 3, 9, 17)),
    ],
}


def run(device: str, sheet: Sheet, only: str | None = None) -> None:
    """Times every case, or those of one part."""
    cases = [case for case in CASES[torch.device(device).type] if only in (None, case.part)]
    copy, passes = copy_bandwidth(device), Passes(device)
    sheet.fill(cases, lambda case: passes.measure(case) if case.part == "pass" else _layer(case, device, copy))


class Passes:
    """Whole passes, of models that are made once for all cases that want them."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._model: Any = None
        self._shape = ""
        self._steps: dict[tuple[str, int, int], float] = {}

    def measure(self, case: Case) -> Row:
        """Milliseconds of a pass over T tokens and of a plain step, and their ratio."""
        if self._shape != case.shape:
            self._model, self._shape = drawn_model(case.shape, self._device, attention=0.5), case.shape
        plain = (case.shape, case.S, case.context)
        seconds = partial(pass_seconds, self._model, slots=case.S, context=case.context)
        if plain not in self._steps:
            self._steps[plain] = seconds(new=1)
        taken, one = seconds(new=case.T), self._steps[plain]
        return {"ms": 1e3 * taken, "plain_ms": 1e3 * one, "over_plain": taken / one}


def _layer(case: Case, device: str, copy: float) -> Row:
    """Every way to verify in one layer: milliseconds a round, bytes moved and held."""
    H, G, P = _LAYERS[case.shape]
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype, generator=generator)

    shape, make = Shape(case.shape, case.S, case.T, H, G, P), _MAKERS[case.mixer]
    rounds, pending = _rounds_between_folds(case.T)
    checked = make(replace(shape, B=min(case.S, _CHECKED_ROWS)), random, pending=pending)
    error = largest_difference(checked, dtype)
    if not error <= TOLERANCE[dtype]:
        return {"red": f"off by {error:.2e} of the largest value"}
    first = make(shape, random, pending=pending)
    state = first.inputs["state"].nbytes
    count = min(-(-_COLD_BYTES[torch.device(device).type] // state), _MOST_LAYERS)
    layers = [first, *(make(shape, random, pending=pending) for _ in range(count - 1))]
    seconds = {REPLAY: _seconds(layers, lambda layer: lambda i: layer.ours(i, "auto"), device)}
    for name in first.peers:
        seconds[name] = _seconds(layers, lambda layer, name=name: layer.peers[name], device)  # type: ignore[misc]
    del layers
    most = ring_capacity(case.T) - 2 * case.T + 1  # the least that is folded
    folding = [make(shape, random, fold=True, pending=most) for _ in range(count)]
    fold = _seconds(folding, lambda layer: lambda i: layer.ours(i, "auto"), device)
    seconds[REPLAY] += (fold - seconds[REPLAY]) / rounds
    with torch.no_grad():
        output = first.ours(first.inputs, "auto").nbytes
    brought = output + sum(part.nbytes for name, part in first.inputs.items() if name != "state")
    entry = sum(first.inputs[name].nbytes for name in ("x", "B", "dt")) // case.T  # of a token in the ring
    moved, held = _bytes(state, brought, entry, case.T, rounds, pending)
    ways = {
        name: {
            "ms": 1e3 * taken,
            "bytes": moved[name],
            "of_copy": moved[name] / taken / copy,
            "held_bytes": held[name],
            "replay_is_faster": taken / seconds[REPLAY],
        }
        for name, taken in seconds.items()
    }
    return {"ways": ways, "layers": count, "rounds_between_folds": rounds, "difference": error}


def _rounds_between_folds(new: int) -> tuple[int, int]:
    """How many rounds there are from one fold to the next where half of the tokens stand, and the mean pending."""
    accepted = (new + 1) // 2
    place = RingPlace.empty(1, new, device="cpu")
    rounds = place.folds_above(new) // accepted + 1
    return rounds, rounds * accepted // 2


def _seconds(layers: list[LayerCase], way: Callable[[LayerCase], Operation], device: str) -> float:
    """Of one layer, where all of them follow each other."""
    operations = [way(layer) for layer in layers]

    @torch.no_grad()
    def run() -> None:
        for layer, operation in zip(layers, operations, strict=True):
            operation(layer.inputs)

    seconds = device_seconds_of(run, device) / len(layers)
    forget(device)
    return seconds


def _bytes(
    state: int, brought: int, entry: int, new: int, rounds: int, pending: int
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """What each way has to move in a round, and what it holds between rounds."""
    ring = ring_capacity(new) * entry
    moved = {
        REPLAY: state + state // rounds + brought + (pending + new) * entry,
        "state per token": (1 + new) * state + brought,
        "copy and recompute": 6 * state + 2 * brought,
        "steps": 2 * new * state + brought,
    }
    held = {
        REPLAY: state + ring,
        "state per token": (1 + new) * state,
        "copy and recompute": 2 * state,
        "steps": (1 + new) * state,
    }
    return moved, held


def table(result: dict[str, Any]) -> Table:
    """The rows of :func:`run` for people."""
    shown = Table(
        title=result["machine"]["device"],
        caption="of copy: share of the copy bandwidth at which a way moves what it has to; others: how much slower",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    for heading in ("part", "of", "S", "T", "ms", "of copy", "holds"):
        shown.add_column(heading, justify="left" if heading in ("part", "of") else "right")
    shown.add_column("others, ms (holds)")
    for row in result["results"]:
        first = [row["part"], f"{row['shape']} {row['mixer']}", str(row["S"]), str(row["T"])]
        if "error" in row:
            shown.add_row(*first, failure(row))
        elif "red" in row:
            shown.add_row(*first, "red", "", "", row["red"])
        elif "ways" in row:
            ours = row["ways"][REPLAY]
            others = [
                f"{name} {significant(way['ms'])}, {way['replay_is_faster']:.2f}× ({way['held_bytes'] / 1e6:.0f} MB)"
                for name, way in row["ways"].items()
                if name != REPLAY
            ]
            shown.add_row(
                *first, significant(ours["ms"]), f"{ours['of_copy']:.0%}", f"{ours['held_bytes'] / 1e6:.0f} MB",
                ", ".join(others),
            )  # fmt: skip
        else:
            plain = f"a plain step {significant(row['plain_ms'])}: {row['over_plain']:.3f} of it"
            shown.add_row(*first, significant(row["ms"]), "", "", plain)
    return shown
