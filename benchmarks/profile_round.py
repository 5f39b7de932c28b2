"""Where the time of a round of speculation goes: its kernels by the device time they take, beside a plain step's.

    python benchmarks/profile_round.py --target smollm2-hybrid --draft DRAFT --K 2 4
    python benchmarks/profile_round.py --layers 2 --words 16384        random weights of the 135M shape

On a GPU rounds are replayed CUDA graphs, as they are in use. A second graph of the same round has a kernel of its own
at every border between its parts, by which the profiler's kernels are told apart; it is never timed as a whole. On a
CPU operations are counted, views and other dispatches that do nothing included, and nothing but the round is timed.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from mambify.bench.clock import seconds_of
from mambify.bench.decode_steps import drawn_model, forget
from mambify.decode.drafts import cut_if_named
from mambify.engine import Sampling, Speculator
from mambify.engine.recording import recorded
from mambify.engine.speculate import Draft
from mambify.families.load import load
from mambify.io import write_json
from mambify.model import HybridForCausalLM

REST = "acceptance and bookkeeping"
DRAFT, TARGET = "draft", "target"
PRODUCTS, MIXERS = "target: products", "target: mixers and the rest"
_OWN_PRODUCTS = ("_stream", "_shared", "_products")  # in whole: "_replay_products" is none
_PRODUCTS = (
    "gemm",
    "gemv",
    "cutlass",
    "nvjet",
    "splitK",
    "addmm",
    "aten.mm",
    "linear",
)
_BORDER = "erfinv"  # of a float64 number: nothing else in a round computes that
_STEPS = 24  # rounds that are timed one after another


class Borders:
    """Which part of a round is under way, and on a GPU a kernel wherever that changes."""

    def __init__(self, device: torch.device) -> None:
        self.part, self.order = REST, [REST]
        self._number = torch.zeros(1, dtype=torch.float64, device=device) if device.type == "cuda" else None

    def __call__(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose kernels belong to ``part``."""

        def within(*arguments: Any, **named: Any) -> Any:
            before = self.part
            self._enter(part)
            try:
                return function(*arguments, **named)
            finally:
                self._enter(before)

        return within

    def _enter(self, part: str) -> None:
        self.part = part
        self.order.append(part)
        if self._number is not None:
            torch.erfinv(self._number)


class Counted(TorchDispatchMode):
    """Notes every operation with the part that it belongs to."""

    def __init__(self, borders: Borders) -> None:
        super().__init__()
        self.found: list[tuple[str, str, float]] = []
        self._borders = borders

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append((self._borders.part, str(function), 0.0))
        return function(*args, **(kwargs or {}))


@contextmanager
def bordered(decoder: Speculator, borders: Borders) -> Iterator[None]:
    """Meanwhile a round of ``decoder`` says which part is under way."""
    places: list[tuple[object, str, str]] = [(decoder.target, "stream", TARGET), (decoder.target, "logits", TARGET)]
    if decoder.draft is not None:
        places += [(decoder, "put_forward", DRAFT), (decoder.draft, "settle", DRAFT)]
    for owner, name, part in places:
        setattr(owner, name, borders(part, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, _ in places:
            delattr(owner, name)


def kernels_of(decoder: Speculator, K: int, context: int) -> list[tuple[str, str, float]]:
    """Every kernel of a round (on a CPU every operation): its part, its name and its µs on the device."""
    device, borders = decoder.device, Borders(decoder.device)
    step = partial(decoder.step, K)
    with bordered(decoder, borders):
        decoder.pretend(context)
        if device.type == "cpu":
            with Counted(borders) as counted:
                step()
            return [(_group(part, name), name, taken) for part, name, taken in counted.found]
        replay = recorded(step, device)
        rounds = 3  # two to warm up, one that is recorded: each went over the same borders
        assert (len(borders.order) - 1) % rounds == 0
        order = borders.order[: 1 + (len(borders.order) - 1) // rounds]
        decoder.pretend(context)
        replay()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recording:
            replay()
            torch.cuda.synchronize()
    found, at = [], 0
    for event in sorted(recording.events(), key=lambda event: event.time_range.start):
        if event.device_type == DeviceType.CUDA:
            if _BORDER in event.name:
                at += 1
            else:
                found.append((_group(order[at], event.name), event.name, event.self_device_time_total))
    assert at == len(order) - 1, f"{at} borders in the profile of a round with {len(order) - 1}"
    return found


def _group(part: str, name: str) -> str:
    if part != TARGET:
        return part
    return PRODUCTS if name in _OWN_PRODUCTS or any(known in name for known in _PRODUCTS) else MIXERS


def round_seconds(decoder: Speculator, context: int) -> float:
    """Wall time of one of several rounds one after another, as they are in use."""
    step = decoder.pretend(context)

    def rounds() -> None:
        decoder.pretend(context)
        for _ in range(_STEPS):
            step()

    def nothing() -> None:
        decoder.pretend(context)

    device = str(decoder.device)
    return (seconds_of(rounds, device) - seconds_of(nothing, device)) / _STEPS


def summary(found: Sequence[tuple[str, str, float]]) -> dict[str, dict[str, Any]]:
    """Of every part its kernels, those that take longest first."""
    times: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for part, name, taken in found:
        times[part, name] += taken
        counts[part, name] += 1
    parts: dict[str, dict[str, Any]] = {}
    for part in dict.fromkeys(part for part, _, _ in found):
        names = sorted((name for p, name in counts if p == part), key=lambda n: (-times[part, n], -counts[part, n]))
        rows = [{"name": n, "count": counts[part, n], "microseconds": round(times[part, n], 2)} for n in names]
        whole = {"count": sum(row["count"] for row in rows)}
        parts[part] = whole | {"microseconds": round(sum(row["microseconds"] for row in rows), 2), "kernels": rows}
    return parts


@torch.inference_mode()
def profiled(target: HybridForCausalLM, draft: Draft, K: int, given: argparse.Namespace) -> dict[str, Any]:
    """A round with K drafted tokens, or a plain step where K is 0."""
    decoder = partial(
        Speculator,
        target,
        draft if K else None,
        num_slots=given.slots,
        max_length=given.context + 2 * _STEPS * (K + 1),
        sampling=Sampling(temperature=given.temperature, seed=0),
        num_draft_tokens=max(K, 1),
    )
    seconds = round_seconds(decoder(), given.context)
    forget(given.device)
    # A kernel that begins while the one before it ends is busy waiting: it is timed alone.
    parts = summary(kernels_of(decoder(overlap=False), K, given.context))
    forget(given.device)
    return {"K": K, "wall_microseconds": round(1e6 * seconds, 1), "parts": parts}


def shown(result: dict[str, Any], top: int) -> Iterator[str]:
    """Lines for people."""
    parts = result["parts"]
    kernels = sum(part["count"] for part in parts.values())
    busy = sum(part["microseconds"] for part in parts.values())
    what = f"round with K = {result['K']}" if result["K"] else "plain step"
    on_gpu = busy > 0
    each, taken = ("kernels", f" that take {busy:.0f} µs one after another") if on_gpu else ("operations", "")
    yield f"{what}: {result['wall_microseconds']:.0f} µs, {kernels} {each}{taken}"
    for name, part in parts.items():
        yield f"  {name}: {part['count']} {each}" + (f", {part['microseconds']:.0f} µs" if on_gpu else "")
        for row in part["kernels"][:top]:
            yield f"    {row['microseconds']:8.1f} µs {row['count']:5d} x  {row['name'][:120]}"


def models_of(given: argparse.Namespace) -> tuple[HybridForCausalLM, Draft]:
    """Target and draft by name, or with random weights."""
    dtype = torch.bfloat16 if torch.device(given.device).type == "cuda" else torch.float32
    if given.target is None:
        target = drawn_model(given.shape, given.device, attention=given.attention)
        features = {"draft_features": True, "num_hidden_layers": given.layers}
        return target, drawn_model(given.shape, given.device, words=given.words, **features)
    loaded: HybridForCausalLM = load(given.target, dtype=dtype, device=given.device).model
    if given.draft == "lookup":
        return loaded, "lookup"
    made = cut_if_named(given.draft, loaded)
    return loaded, made if isinstance(made, HybridForCausalLM) else load(
        given.draft, dtype=dtype, device=given.device
    ).model


def main(arguments: Sequence[str] | None = None) -> None:
    """Profiles a plain step and rounds of the models on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="a model by name or folder; random weights by default")
    parser.add_argument("--draft", default="lookup", help="of --target: a model, cut:2, or lookup")
    parser.add_argument("--shape", default="135M", help="of random weights")
    parser.add_argument("--attention", type=float, default=0.5, help="share of the target's layers, of random weights")
    parser.add_argument("--layers", type=int, default=2, help="of the draft, of random weights")
    parser.add_argument("--words", type=int, default=16_384, help="that the draft knows, of random weights")
    parser.add_argument("--K", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--context", type=int, default=512, help="tokens in each slot")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--top", type=int, default=12, help="kernels shown of each part")
    parser.add_argument("--json", type=Path, help="write everything here")
    given = parser.parse_args(arguments)
    target, draft = models_of(given)
    results = []
    for K in (0, *given.K):
        results.append(profiled(target, draft, K, given))
        print("\n".join(shown(results[-1], given.top)), flush=True)
    if given.json is not None:
        device = torch.cuda.get_device_name() if torch.device(given.device).type == "cuda" else given.device
        facts = {name: value for name, value in vars(given).items() if name not in ("json", "top", "device")}
        write_json(given.json, {"device": device, **facts, "results": results})


if __name__ == "__main__":
    main()
