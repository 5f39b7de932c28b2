"""``mambify bench ops``: every operation, forward and backward, beside what transformers or torch has for the same.

Letters: B batch, T tokens, H query heads, G key/value heads, P head dimension (= N, the state size of Mamba2),
C conv channels, K conv width, J sub-heads of M channels (Mamba1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mamba.modeling_mamba import mamba_selective_scan, mamba_selective_state_update
from transformers.models.mamba2.modeling_mamba2 import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

from mambify.bench.machine import seconds_of
from mambify.evaluate.report.quantities import significant
from mambify.ops.causal_conv import causal_conv, causal_conv_step
from mambify.ops.gated_norm import gated_rms_norm
from mambify.ops.selective_scan import selective_scan, selective_scan_step
from mambify.ops.ssd import ssd_scan, ssd_step

_K, _SUBHEAD = 4, 16
_SHORTER = 4  # of the selective scan: the time of transformers' backward pass grows with the square of T
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer and one batch."""

    name: str
    B: int
    T: int
    H: int
    G: int
    P: int


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs, ours and theirs, both giving one output tensor of the same values.

    Attributes:
        other_name: who wrote the other one.
        step: one token of decoding, which has no backward pass.
    """

    operation: str
    shape: str
    inputs: Inputs
    ours: Callable[[Inputs], Tensor]
    other: Callable[[Inputs], Tensor]
    other_name: str = "transformers"
    step: bool = False


SHAPES = {
    "cpu": (Shape("135M", 1, 512, 9, 3, 64), Shape("1B", 1, 512, 32, 8, 64)),
    "cuda": (Shape("135M", 16, 512, 9, 3, 64), Shape("8B", 1, 4096, 32, 8, 128)),
}


def run(device: str, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Times every case; ``difference`` is the largest between ours and theirs, over the largest value."""
    kind = torch.device(device).type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    makers = [(shape, maker) for shape in SHAPES[kind] for maker in _MAKERS]
    rows = []
    for done, (shape, maker) in enumerate(makers):
        progress(done, len(makers))
        generator = torch.Generator(device).manual_seed(0)

        def random(*sizes: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*sizes, device=device, dtype=dtype, generator=generator)

        rows += list(_rows(maker(shape, random), device, dtype))
    progress(len(makers), len(makers))
    return {"results": rows}


def table(result: dict[str, Any]) -> Table:
    """The rows of :func:`run` for people."""
    copy = result["machine"]["copy_bytes_per_second"] / 1e9
    shown = Table(
        title=f"{result['machine']['device']}, which copies {copy:.1f} GB/s",
        caption="theirs: transformers' torch code (gated_rms_norm: torch's own)\n"
        "of copy: share of the copy bandwidth at which the bytes moved that must move at least",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    for heading in ("operation", "shape", "pass"):
        shown.add_column(heading)
    for heading in ("ms", "theirs", "speed-up", "of copy"):
        shown.add_column(heading, justify="right")
    for row in result["results"]:
        rate = row["bytes"] / row["ms"] / 1e6
        shown.add_row(
            row["operation"], row["shape"], row["pass"], significant(row["ms"]), significant(row["other_ms"]),
            f"{row['other_ms'] / row['ms']:.2f}×", f"{rate / copy:.0%}",
        )  # fmt: skip
    return shown


def _rows(case: Case, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    facts = {"operation": case.operation, "shape": case.shape, "dtype": str(dtype).removeprefix("torch.")}
    with torch.no_grad():
        ours, theirs = case.ours(case.inputs), case.other(case.inputs)
        difference = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
        # Every input read once and the output written once: what cannot be avoided.
        moved = sum(value.nbytes for value in case.inputs.values()) + ours.nbytes
        yield facts | {
            "pass": "step" if case.step else "fwd",
            "ms": 1e3 * seconds_of(lambda: case.ours(case.inputs), device),
            "other_ms": 1e3 * seconds_of(lambda: case.other(case.inputs), device),
            "other": case.other_name,
            "bytes": moved,
            "difference": difference,
        }
    if case.step:
        return
    yield facts | {
        "pass": "fwd+bwd",
        "ms": 1e3 * seconds_of(lambda: _backward(case.ours, case.inputs), device),
        "other_ms": 1e3 * seconds_of(lambda: _backward(case.other, case.inputs), device),
        "other": case.other_name,
        # Forward as above; backward reads inputs and the output's gradient and writes the inputs' gradients.
        "bytes": 3 * moved - ours.nbytes,
        "difference": difference,
    }


def _backward(function: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    output = function(leaves)
    return torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))


def _ssd(s: Shape, random: Callable[..., Tensor]) -> Case:
    inputs = {
        "x": random(s.B, s.T, s.G, s.P),
        "dt": F.softplus(random(s.B, s.T, s.H).float() - 2),
        "A": -random(s.H).float().abs() - 1,
        "B": random(s.B, s.T, s.G, s.P) / s.P**0.5,
        "C": random(s.B, s.T, s.H, s.P),
        "D": random(s.H).float(),
    }

    def ours(i: Inputs) -> Tensor:
        return ssd_scan(i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"])[0]

    def other(i: Inputs) -> Tensor:
        x, B = (i[name].repeat_interleave(s.H // s.G, dim=2) for name in ("x", "B"))
        y: Tensor = mamba2_chunk_scan(x, i["dt"], i["A"], B, i["C"], chunk_size=64, D=i["D"])
        return y

    return Case("ssd_scan", f"B={s.B} T={s.T} H={s.H} G={s.G} P={s.P}", inputs, ours, other)


def _ssd_step(s: Shape, random: Callable[..., Tensor]) -> Case:
    inputs = {
        "x": random(s.B, s.G, s.P),
        "dt": F.softplus(random(s.B, s.H).float() - 2),
        "A": -random(s.H).float().abs() - 1,
        "B": random(s.B, s.G, s.P) / s.P**0.5,
        "C": random(s.B, s.H, s.P),
        "D": random(s.H).float(),
        "state": random(s.B, s.H, s.P, s.P).float(),
    }

    def ours(i: Inputs) -> Tensor:
        return ssd_step(i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], i["state"])[0]

    scratch = inputs["state"].clone()

    def other(i: Inputs) -> Tensor:
        scratch.copy_(i["state"])  # theirs writes the new state over the old one; ours returns it
        x, B = (i[name].repeat_interleave(s.H // s.G, dim=1) for name in ("x", "B"))
        dt, A, D = i["dt"][..., None].expand(-1, -1, s.P), i["A"][:, None, None], i["D"][:, None]
        y: Tensor = mamba2_selective_state_update(scratch, x, dt, A.expand(-1, s.P, s.P), B, i["C"], D.expand(-1, s.P))
        return y

    return Case("ssd_step", f"B={s.B} H={s.H} G={s.G} P={s.P}", inputs, ours, other, step=True)


def _conv(s: Shape, random: Callable[..., Tensor]) -> Case:
    C = (2 * s.G + s.H) * s.P
    inputs = {"x": random(s.B, s.T, C), "weight": random(C, _K), "bias": random(C)}

    def ours(i: Inputs) -> Tensor:
        return causal_conv(i["x"], i["weight"], i["bias"])[0]

    def other(i: Inputs) -> Tensor:
        y: Tensor = causal_conv1d_fn(i["x"].transpose(1, 2), i["weight"], i["bias"], "silu").transpose(1, 2)
        return y

    return Case("causal_conv", f"B={s.B} T={s.T} C={C} K={_K}", inputs, ours, other)


def _conv_step(s: Shape, random: Callable[..., Tensor]) -> Case:
    C = (2 * s.G + s.H) * s.P
    inputs = {"x": random(s.B, C), "weight": random(C, _K), "bias": random(C), "state": random(s.B, C, _K - 1)}

    def ours(i: Inputs) -> Tensor:
        return causal_conv_step(i["x"], i["weight"], i["bias"], i["state"])[0]

    scratch = inputs["state"].clone()

    def other(i: Inputs) -> Tensor:
        scratch.copy_(i["state"])
        y: Tensor = causal_conv1d_update(i["x"][..., None], scratch, i["weight"], i["bias"], "silu")[..., 0]
        return y

    return Case("causal_conv_step", f"B={s.B} C={C} K={_K}", inputs, ours, other, step=True)


def _norm(s: Shape, random: Callable[..., Tensor]) -> Case:
    inputs = {"y": random(s.B, s.T, s.H, s.P), "z": random(s.B, s.T, s.H, s.P), "weight": random(s.H, s.P)}

    def ours(i: Inputs) -> Tensor:
        return gated_rms_norm(i["y"], i["z"], i["weight"], 1e-5)

    def other(i: Inputs) -> Tensor:
        gated = i["y"].float() * F.silu(i["z"].float())
        return F.rms_norm(gated, (s.P,), eps=1e-5).to(i["z"].dtype) * i["weight"]

    return Case("gated_rms_norm", f"B={s.B} T={s.T} H={s.H} P={s.P}", inputs, ours, other, other_name="torch")


def _selective(s: Shape, random: Callable[..., Tensor]) -> Case:
    J, M, T = s.H * s.P // _SUBHEAD, _SUBHEAD, s.T // _SHORTER
    inputs = {
        "x": random(s.B, T, J, M),
        "dt": F.softplus(random(s.B, T, J, M).float() - 2),
        "A": -random(M, M).float().abs() - 0.5,  # the same in all sub-heads: theirs takes sub-heads as a batch
        "B": random(s.B, T, J, M),
        "C": random(s.B, T, J, M),
        "D": random(M).float(),
    }

    def ours(i: Inputs) -> Tensor:
        A, D = i["A"].expand(J, M, M), i["D"].expand(J, M)
        return selective_scan(i["x"], i["dt"], A, i["B"], i["C"], D)[0]

    def other(i: Inputs) -> Tensor:
        x, dt, B, C = (i[name].permute(0, 2, 3, 1).flatten(0, 1) for name in ("x", "dt", "B", "C"))
        y: Tensor = mamba_selective_scan(x, dt, i["A"], B, C, i["D"]).unflatten(0, (s.B, J)).permute(0, 3, 1, 2)
        return y

    return Case("selective_scan", f"B={s.B} T={T} J={J} M={M}", inputs, ours, other)


def _selective_step(s: Shape, random: Callable[..., Tensor]) -> Case:
    J, M = s.H * s.P // _SUBHEAD, _SUBHEAD
    inputs = {
        "x": random(s.B, J, M),
        "dt": F.softplus(random(s.B, J, M).float() - 2),
        "A": -random(M, M).float().abs() - 0.5,
        "B": random(s.B, J, M),
        "C": random(s.B, J, M),
        "D": random(M).float(),
        "state": random(s.B, J, M, M).float(),
    }

    def ours(i: Inputs) -> Tensor:
        A, D = i["A"].expand(J, M, M), i["D"].expand(J, M)
        return selective_scan_step(i["x"], i["dt"], A, i["B"], i["C"], D, i["state"])[0]

    scratch = inputs["state"].clone().flatten(0, 1)

    def other(i: Inputs) -> Tensor:
        scratch.copy_(i["state"].flatten(0, 1))
        x, dt, B, C = (i[name].flatten(0, 1) for name in ("x", "dt", "B", "C"))
        y: Tensor = mamba_selective_state_update(scratch, x, dt, i["A"], B, C, i["D"]).unflatten(0, (s.B, J))
        return y

    return Case("selective_scan_step", f"B={s.B} J={J} M={M}", inputs, ours, other, step=True)


_MAKERS = (_ssd, _ssd_step, _selective, _selective_step, _conv, _conv_step, _norm)
