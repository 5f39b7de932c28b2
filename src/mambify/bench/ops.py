"""``mambify bench ops``: every operation, forward and backward, beside other people's code for the same.

A kernel is first held against the reference in float32, outputs and every gradient; one that is off is reported as
such, without a time. On a GPU times are those of a recorded CUDA graph: what the device takes, without what launching
costs; others' code that waits for the device and cannot be recorded is timed as it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor

from mambify.bench.case import Case, Inputs, Operation, Random, Shape
from mambify.bench.cases import MAKERS, SCANS, SHAPES
from mambify.bench.clock import device_seconds_of, seconds_of
from mambify.bench.peers import PeerMissingError
from mambify.bench.replay_cases import REPLAY_MAKERS, REPLAY_SHAPES
from mambify.bench.sheet import Row, Sheet, failure
from mambify.evaluate.report.quantities import significant

#: largest difference from the reference, over the largest value, that passes
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2}


def run(device: str, sheet: Sheet, only: str | None = None) -> None:
    """Checks and times every case, or those of one operation."""
    kind = torch.device(device).type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    cases = [
        (name, shape, maker)
        for shapes, named in ((SHAPES, MAKERS), (REPLAY_SHAPES, REPLAY_MAKERS))
        for shape in shapes[kind]
        for name, maker in named.items()
        # Long rows matter to scans only.
        if (name in SCANS or not shape.name.startswith("16k")) and only in (None, name)
    ]

    def measure(case: tuple[str, Shape, Callable[[Shape, Random], Case]]) -> Iterator[Row]:
        _, shape, maker = case
        generator = torch.Generator(device).manual_seed(0)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device, dtype=dtype, generator=generator)

        return _rows(maker(shape, random), device, dtype)

    sheet.fill(cases, measure, about=lambda case: {"operation": case[0], "shape": case[1].name})


def table(result: dict[str, Any]) -> Table:
    """The rows of :func:`run` for people."""
    copy = result["machine"]["copy_bytes_per_second"] / 1e9
    shown = Table(
        title=f"{result['machine']['device']}, which copies {copy:.1f} GB/s",
        caption="of copy: share of the copy bandwidth at which the bytes moved that must move at least",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    for heading in ("operation", "shape", "pass"):
        shown.add_column(heading)
    for heading in ("ms", "of copy"):
        shown.add_column(heading, justify="right")
    shown.add_column("others, ms")
    for row in result["results"]:
        if "error" in row:
            shown.add_row(row["operation"], row["shape"], "", failure(row))
            continue
        if "red" in row:
            shown.add_row(row["operation"], row["shape"], row["pass"], "red", "", row["red"])
            continue
        others = [
            f"{name} {significant(other['ms'])} ({other['ms'] / row['ms']:.2f}×)"
            for name, other in row["peers"].items()
            if "ms" in other
        ]
        shown.add_row(
            row["operation"], row["shape"], row["pass"], significant(row["ms"]),
            f"{row['bytes'] / row['ms'] / 1e6 / copy:.0%}", ", ".join(others),
        )  # fmt: skip
    return shown


def _rows(case: Case, device: str, dtype: torch.dtype) -> Iterator[Row]:
    facts: dict[str, Any] = {"operation": case.operation, "shape": case.shape}
    facts["dtype"] = str(dtype).removeprefix("torch.")
    error = largest_difference(case, dtype)
    with torch.no_grad():
        output = case.ours(case.inputs, "auto")
    # Every input read once and the output written once: what cannot be avoided.
    moved = sum(value.nbytes for value in case.inputs.values()) + output.nbytes
    # Forward as above; backward reads inputs and the output's gradient and writes the inputs' gradients.
    passes = [("step", moved)] if case.step else [("fwd", moved), ("fwd+bwd", 3 * moved - output.nbytes)]
    for name, size in passes:
        if not error <= TOLERANCE[dtype]:
            yield facts | {"pass": name, "red": f"off by {error:.2e} of the largest value"}
            continue

        ones = torch.ones_like(output)

        def timed(
            operation: Operation, inputs: Inputs, recorded: bool = True, name: str = name, ones: Tensor = ones
        ) -> float:
            clock, there = device_seconds_of if recorded else seconds_of, replace(case, inputs=inputs)
            return 1e3 * clock(lambda: _pass(operation, there, name, ones), device)

        others: dict[str, dict[str, Any]] = {}
        for other, operation in case.peers.items():
            try:
                inputs = case.inputs_of(other)
                with torch.no_grad():
                    theirs = operation(inputs)
                others[other] = {
                    "difference": _difference(theirs, output),
                    "ms": timed(operation, inputs, other not in case.unrecorded),
                }
            except PeerMissingError as missing:
                others[other] = {"missing": str(missing)}
            except Exception as failure:  # theirs, whatever it is: it stands in the result in place of a time
                others[other] = {"failed": f"{type(failure).__name__}: {failure}"}
        yield facts | {
            "pass": name,
            "ms": timed(lambda inputs: case.ours(inputs, "auto"), case.inputs),
            "bytes": size,
            "difference": error,
            "peers": others,
        }


def _pass(operation: Operation, case: Case, name: str, ones: Tensor) -> object:
    if name == "fwd+bwd":
        return gradients(operation, case, ones)
    with torch.no_grad():
        return operation(case.inputs)


def gradients(operation: Operation, case: Case, ones: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of the sum of the output, for every input that trains; ``ones`` spares making the output's own gradient."""
    trained = tuple(case.inputs) if case.trained is None else case.trained
    leaves = {name: value.detach().requires_grad_(name in trained) for name, value in case.inputs.items()}
    output = operation(leaves)
    ones = torch.ones_like(output) if ones is None else ones
    return torch.autograd.grad(output, [leaves[name] for name in trained], ones)


def largest_difference(case: Case, dtype: torch.dtype) -> float:
    """Between ours and the reference in float32, over outputs and gradients, relative to the largest value of each."""
    exact = {k: v.float() if v.dtype == dtype else v for k, v in case.inputs.items()}
    single = replace(case, inputs=exact)
    with torch.no_grad():
        pairs = [(case.ours(case.inputs, "auto"), case.ours(exact, "reference"))]
    if case.exact:
        return float((pairs[0][0] != pairs[0][1]).float().mean())
    if not case.step:
        ours = gradients(lambda inputs: case.ours(inputs, "auto"), case)
        pairs += zip(ours, gradients(lambda inputs: case.ours(inputs, "reference"), single), strict=True)
    return max(_difference(ours, truth) for ours, truth in pairs)


def _difference(ours: Tensor, truth: Tensor) -> float:
    return float((ours.float() - truth.float()).abs().max() / truth.float().abs().max().clamp(min=1e-12))
