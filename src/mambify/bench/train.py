"""``mambify bench train``: steps of the align and kd stages, in tokens a second and peak memory.

Teachers have random weights, which cost the same as trained ones. A step is what a run does: forward and backward
pass through the stage's own code (recorded as a CUDA graph on a GPU), clipping, AdamW. Rows named ``plain`` do the
same with what a straightforward script would hold: a teacher that shares nothing with the student, and a loss on whole
``[B, T, V]`` logits.

Started in several processes (``torchrun --nproc_per_node 2 -m mambify bench train --only processes``), each has the
case's sequences, and tokens a second are those of all; with ``ACCELERATE_USE_FSDP=true FSDP_VERSION=2`` weights are
sharded.

FLOPs are those of PyTorch's matrix products in one step, counted by ``torch.utils.flop_counter``: a multiply and an add
are two. Attention counts the pairs that a causal mask leaves, and 2.5 times that in the backward pass. The scan's own
products run in kernels the counter does not see and are left out, so the share of the peak is a little low.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mambify.bench.clock import matmul_peak, seconds_of
from mambify.bench.shapes import SHAPES, model_of_shape
from mambify.bench.sheet import Sheet, failure
from mambify.conversion import apply_plan, plan
from mambify.distill.arguments import use_bfloat16
from mambify.distill.checkpoints import trained_parameters
from mambify.distill.graphs import GraphedStep, StepResult, Sums
from mambify.distill.parallel import Processes, joined
from mambify.distill.recipe import Align, Kd
from mambify.distill.sharding import shard
from mambify.distill.stages import stage_module
from mambify.distill.trainer import DistillationStage, scale_gradients
from mambify.model import HybridForCausalLM

_WARM_UP, _STEPS = 3, 10  # of processes together


@dataclass(frozen=True)
class Case:
    """One step to measure.

    Attributes:
        curve: the growth curve this is a point of.
        attention: share of layers that keep attention.
        ops: implementation of the mixers' operations, as in HybridConfig.
        plain: a teacher of its own and whole logits.
        checkpointing: recompute each block's activations in the backward pass.
    """

    curve: str
    stage: str
    shape: str
    context: int
    sequences: int
    attention: float = 0.5
    mixer: str = "mamba2"
    ops: str = "auto"
    plain: bool = False
    checkpointing: bool = False


_BASE = Case("headline", "kd", "135M", 512, 32)
CASES: dict[str, list[Case]] = {
    "cpu": [Case(curve, stage, "tiny", 64, 2) for curve in ("headline", "processes") for stage in ("align", "kd")],
    "cuda": [
        *(replace(_BASE, stage=stage) for stage in ("align", "kd")),
        replace(_BASE, mixer="mamba1"),
        *(replace(_BASE, curve="reference", stage=stage, ops="reference") for stage in ("align", "kd")),
        *(replace(_BASE, curve="batch", sequences=n) for n in (8, 32, 128)),
        *(replace(_BASE, curve="context", context=32 * 2**n, sequences=1024 // 2**n) for n in (4, 6, 8, 10)),
        *(replace(_BASE, curve="converted", attention=share) for share in (0.75, 0.5, 0.25, 0.0)),
        *(Case("size", stage, "1B", 2048, 8) for stage in ("align", "kd")),
        *(Case("size", stage, "8B", 2048, 2) for stage in ("align", "kd")),
        *(Case("size", "kd", "8B", 2048, 1, plain=plain) for plain in (False, True)),
        Case("size", "kd", "8B", 2048, 8, checkpointing=True),
        *(Case("processes", stage, "1B", 2048, n) for n in (8, 32) for stage in ("align", "kd")),
    ],
}


def run(device: str, sheet: Sheet, only: str | None = None) -> None:
    """Measures every case, or those of one curve; one that does not fit the memory says so instead of figures."""
    cases = [case for case in CASES[torch.device(device).type] if only in (None, case.curve)]
    with joined(device) as processes:
        peak, count = matmul_peak(processes.device), processes.count
        sheet.facts |= {
            "matmul_flops_per_second": peak, "processes": count, "sharded": processes.sharding is not None
        }  # fmt: skip
        sheet.fill(cases, lambda case: _measure(case, processes, peak), go_on=count == 1)


def table(result: dict[str, Any]) -> Table:
    """The rows of :func:`run` for people."""
    peak = result["matmul_flops_per_second"] / 1e12
    shown = Table(
        title=f"{result['machine']['device']}, whose matrix products reach {peak:.1f} TFLOP/s",
        caption="of peak: FLOPs of PyTorch's matrix products and attention, the scans' own left out",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    for heading in ("curve", "stage", "shape", "batch", "attention", "ops"):
        shown.add_column(heading)
    for heading in ("ms", "tokens/s", "of peak", "peak memory"):
        shown.add_column(heading, justify="right")
    for row in result["results"]:
        kind = [row["mixer"] if row["mixer"] != "mamba2" else "", "plain" if row["plain"] else ""]
        kind.append("checkpointing" if row["checkpointing"] else "")
        figures: list[str | Text] = ["out of memory"]
        if "error" in row:
            figures = [failure(row)]
        elif row["fits"]:
            share = "" if row["of_matmul_peak"] is None else f"{row['of_matmul_peak']:.0%}"
            memory = f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else ""
            figures = [f"{row['ms']:.1f}", f"{row['tokens_per_second']:,.0f}", share, memory]
        shown.add_row(
            row["curve"], row["stage"], row["shape"], f"{row['sequences']} × {row['context']}",
            f"{row['attention']:.0%}", " ".join(filter(None, [row["ops"], *kind])), *figures,
        )  # fmt: skip
    return shown


def _measure(case: Case, processes: Processes, peak: float) -> dict[str, Any]:
    device = processes.device
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step, flops = build_step(case, processes)
        seconds = seconds_of(step, device) if processes.count == 1 else _seconds_together(step, processes)
    except torch.OutOfMemoryError:
        if processes.count > 1:
            raise  # the others would wait for this one
        return {"fits": False}
    tokens = case.sequences * case.context * processes.count
    return {
        "fits": True,
        "ms": 1e3 * seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_token": None if flops is None else flops * processes.count / tokens,
        "of_matmul_peak": None if flops is None else flops / seconds / peak,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }


def _seconds_together(step: Callable[[], None], processes: Processes) -> float:
    """Mean time of a step that processes take together: each must take as many, so their number is fixed."""
    for _ in range(_WARM_UP):
        step()
    processes.gather(0.0)  # all begin at once
    start = time.perf_counter()
    for _ in range(_STEPS):
        step()
    if torch.device(processes.device).type == "cuda":
        torch.cuda.synchronize()
    return max(processes.gather((time.perf_counter() - start) / _STEPS))


def build_step(case: Case, processes: Processes, *, graph: bool = True) -> tuple[Callable[[], None], int | None]:
    """One optimizer step of the case, and the FLOPs of its matrix products (not counted where weights are sharded).

    Args:
        graph: record forward and backward as a CUDA graph, where a run does.
    """
    torch.manual_seed(0)
    device, sharded = processes.device, processes.sharding is not None
    teacher = _teacher(case, device).to(processes.home)  # drawn on the device: one CPU thread would take minutes
    module = _module(case, teacher)
    bfloat16 = teacher.dtype == torch.bfloat16
    if sharded:
        module = shard(module, processes, bfloat16=bfloat16)
    module.train()
    parameters = list(trained_parameters(module).values())
    on_gpu = torch.device(device).type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=on_gpu)
    torch.manual_seed(processes.rank)
    ids = torch.randint(SHAPES[case.shape].vocabulary, (case.sequences, case.context), device=device)
    batch = {"input_ids": ids, "labels": ids}

    def gradients(batch: dict[str, Tensor]) -> StepResult:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            return module.accumulate_gradients(module, batch, torch.Tensor.backward)

    flops = None
    if not sharded:
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            gradients(batch)
        flops = counter.get_total_flops()
        optimizer.zero_grad()
    recorded = on_gpu and graph and not case.checkpointing and not sharded
    go = GraphedStep(gradients, parameters, batch, accumulates=False) if recorded else gradients

    def step() -> None:
        sums = {name: processes.total(pair.clone()) for name, pair in go(batch).sums.items()}
        processes.add_up_gradients(parameters)
        module.finish_gradients(sums)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=on_gpu)
        optimizer.step()
        optimizer.zero_grad()

    return step, flops


def _teacher(case: Case, device: str) -> HybridForCausalLM:
    dtype = torch.bfloat16 if use_bfloat16("auto", torch.device(device).type) else torch.float32
    positions = max(case.context, 2048)
    return model_of_shape(case.shape, device, dtype, max_position_embeddings=positions, ops_backend=case.ops)


def _module(case: Case, teacher: HybridForCausalLM) -> DistillationStage:
    student = apply_plan(teacher, plan(teacher.config, mixer=case.mixer, attention=case.attention))
    for index in student.config.converted_layers:
        student.model.layers[index].mixer.float()
    stage: Align | Kd
    if case.stage == "align":
        stage = Align(kind="align", tokens=1, learning_rate=1.0)
    else:
        stage = Kd(kind="kd", tokens=1, learning_rate=1.0, gradient_checkpointing=case.checkpointing)
    module = stage_module(stage, student, teacher)
    assert isinstance(module, DistillationStage)
    return PlainDistiller(student, copy.deepcopy(teacher)) if case.plain else module


def _forward_flops(q_BHTP: torch.Size, k_BGSP: torch.Size, *_: Any, **__: Any) -> int:
    """Of causal attention, two products over half of all pairs; the counter's own knows no grouped queries."""
    B, H, T, P = q_BHTP
    return 2 * B * H * T * k_BGSP[2] * P


def _backward_flops(_: torch.Size, q_BHTP: torch.Size, k_BGSP: torch.Size, *__: Any, **___: Any) -> int:
    """Five products for two."""
    return _forward_flops(q_BHTP, k_BGSP) * 5 // 2


_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention{direction}"): count
    for kind in ("flash", "efficient", "cudnn")
    for direction, count in (("", _forward_flops), ("_backward", _backward_flops))
}


class PlainDistiller(DistillationStage):
    """The same loss as a script of a few lines has it: logits of all positions at once, left to autograd."""

    def __init__(self, student: HybridForCausalLM, teacher: HybridForCausalLM) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher]

    def accumulate_gradients(
        self, forward: Callable[..., Any], batch: dict[str, Tensor], backward: Callable[[Tensor], None]
    ) -> StepResult:
        with torch.no_grad():
            teacher_BTV = self._teacher[0](input_ids=batch["input_ids"], use_cache=False).logits
        student_BTV = self.student(input_ids=batch["input_ids"], use_cache=False).logits
        log_p, log_q = (logits.float().log_softmax(-1) for logits in (student_BTV, teacher_BTV))
        loss = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
        backward(loss)
        count = torch.full_like(loss, batch["input_ids"].numel())
        return StepResult(loss.detach(), {"kl": torch.stack([loss.detach(), count])})

    def finish_gradients(self, sums: Sums) -> None:
        scale_gradients(self.parameters(), sums["kl"][1].reciprocal())
