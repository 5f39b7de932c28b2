"""Runs a recipe's stages in one directory, from wherever an earlier run of the same recipe stopped.

RUN/recipe.yaml          the recipe with every default written out
RUN/environment.json     versions, device, command
RUN/metrics.jsonl        one line a log event, all stages
RUN/stages/01-align/     checkpoints, TensorBoard events; trained.safetensors and summary.json once done
RUN/student/             the final model

Of several processes only the first writes here; the others read, so that all of them can continue a run.
"""

from __future__ import annotations

import copy
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import set_seed

from mambify.conversion import CALIBRATION_TOKENS, apply_plan, calibrate, needs_text, plan
from mambify.distill.logs import Listener, MetricsLog, forget_after
from mambify.distill.parallel import Processes
from mambify.distill.recipe import Align, Recipe, Stage, dump_recipe
from mambify.distill.sharding import lent, shard
from mambify.distill.stages import (
    build_trainer,
    stage_module,
    train_stage,
    training_arguments,
    unshare_mlps,
    use_bfloat16,
    why_no_graphs,
)
from mambify.distill.trainer import (
    copy_trained,
    last_complete_checkpoint,
    load_trained,
    save_trained,
    trained_parameters,
)
from mambify.errors import OutputExistsError
from mambify.families.load import LoadedModel, save
from mambify.io import append_jsonl, atomic_write_text, read_json, write_json
from mambify.machine import environment
from mambify.model import HybridForCausalLM

_TRAINED, _SUMMARY = "trained.safetensors", "summary.json"


@dataclass(frozen=True)
class Step:
    """One entry of the work list: a stage at one attention share.

    Attributes:
        name: directory name, ``01-align``.
        stage: the recipe's stage.
        attention: share of layers that keep attention from here on.
    """

    name: str
    stage: Stage
    attention: float


def steps_of(recipe: Recipe) -> list[Step]:
    """The recipe's stages, repeated at each share of a progressive schedule."""
    pairs = [(share, stage) for share in recipe.student.schedule for stage in recipe.stages]
    return [Step(f"{i:02d}-{stage.kind}", stage, share) for i, (share, stage) in enumerate(pairs, start=1)]


def open_run(recipe: Recipe, processes: Processes, *, overwrite: bool = False) -> Path:
    """The run directory: new, or that of an earlier run of the same recipe.

    Raises:
        OutputExistsError: something else is there.
    """
    processes.first_does(lambda: _open_run(recipe, processes, overwrite=overwrite))
    return Path(recipe.output)


def _open_run(recipe: Recipe, processes: Processes, *, overwrite: bool) -> None:
    run, text = Path(recipe.output), dump_recipe(recipe)
    if overwrite and run.exists():
        shutil.rmtree(run)
    existing = run / "recipe.yaml"
    if existing.is_file():
        if existing.read_text(encoding="utf-8") != text:
            raise OutputExistsError(f"{run} holds a run of another recipe: choose another output or pass --overwrite")
        return
    if run.exists() and any(run.iterdir()):
        raise OutputExistsError(f"{run} is not empty and no run: choose another output or pass --overwrite")
    atomic_write_text(existing, text)
    write_json(
        run / "environment.json", {"command": sys.argv} | environment(processes.device) | {"processes": processes.count}
    )


def run_stages(
    recipe: Recipe,
    run: Path,
    *,
    teacher: LoadedModel,
    dataset: Dataset[Any],
    processes: Processes,
    save_to: Path | None = None,
    listener: Listener | None = None,
    announce: Callable[[str], None] | None = None,
) -> HybridForCausalLM:
    """Converts and trains through every stage, skipping those that are done; saves and returns the student.

    What is frozen is computed in the recipe's precision; where that is not the teacher's own dtype, a copy in it is
    made for the run, and the student that is saved keeps the teacher's weights as they were.

    Args:
        run: what :func:`open_run` gave.
        teacher: anywhere; it is only read.
        dataset: blocks of ``recipe.data.context_length`` tokens.
        processes: those that share the work, and where this one trains.
        save_to: where the student is saved; the run's ``student`` folder by default.
        listener: told of every step, in the first process.
        announce: told in words how each stage runs, in the first process.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite.
        OutputWriteError: the disk refused a write; what was written before is whole.
    """
    bfloat16 = use_bfloat16(recipe.precision, processes.device)
    working = in_dtype(teacher.model, torch.bfloat16 if bfloat16 else torch.float32, processes.home)
    work = _Work(recipe, run, working, dataset, processes, bfloat16, listener, announce or (lambda _: None))
    student = working
    for step in steps_of(recipe):
        student = _converted(student, recipe, step.attention, measured=work)
        _run_step(work, step, student)
    final = _final_student(recipe, teacher.model, student)
    teacher.model.requires_grad_(True)
    processes.first_does(lambda: _save_student(final, save_to or run / "student", teacher))
    return final


@dataclass(frozen=True)
class _Work:
    """What all steps of a run have in common."""

    recipe: Recipe
    run: Path
    teacher: HybridForCausalLM
    dataset: Dataset[Any]
    processes: Processes
    bfloat16: bool
    listener: Listener | None
    announce: Callable[[str], None]


def _save_student(student: HybridForCausalLM, path: Path, teacher: LoadedModel) -> None:
    if not path.is_dir():
        save(student, path, tokenizer=teacher.tokenizer)


def in_dtype(model: HybridForCausalLM, dtype: torch.dtype, device: str) -> HybridForCausalLM:
    """``model`` itself where it has this dtype and place already, else a copy."""
    same_place = model.device.type == torch.device(device).type
    return model if model.dtype == dtype and same_place else copy.deepcopy(model).to(device=device, dtype=dtype)


def _final_student(recipe: Recipe, teacher: HybridForCausalLM, trained: HybridForCausalLM) -> HybridForCausalLM:
    """The teacher's kept weights as they are, with what was trained put in: what a user gets."""
    final = teacher
    for share in recipe.student.schedule:
        final = _converted(final, recipe, share)
    if any(getattr(stage, "mlp_learning_rate", 0) for stage in recipe.stages):
        unshare_mlps(final, teacher)
    kept = {p.data_ptr() for p in teacher.parameters()}
    source = dict(trained.named_parameters())
    with torch.no_grad():
        for name, parameter in final.named_parameters():
            if parameter.data_ptr() not in kept:
                parameter.copy_(source[name])
    final.requires_grad_(True)
    return final


def _converted(
    model: HybridForCausalLM, recipe: Recipe, attention: float, measured: _Work | None = None
) -> HybridForCausalLM:
    """``model`` with the layers of this attention share converted; new mixers are float32 masters.

    An initialisation that is measured on text is measured on the training text of ``measured``, through its teacher;
    without it the mixers' values do not matter, for they are about to be replaced.
    """
    init = "identity" if measured is None else recipe.student.init
    planned = plan(
        model.config,
        mixer=recipe.student.mixer,
        attention=attention,
        attention_layers=recipe.student.attention_layers,
        init=init,
    )
    if not planned.converted:
        return model
    blocks = None if measured is None or not needs_text(init) else calibration_blocks(measured.dataset)
    teacher = None if measured is None else measured.teacher
    student = apply_plan(model, planned, seed=recipe.seed, calibration=blocks, measured_on=teacher)
    for index in planned.converted:
        student.model.layers[index].mixer.float()
    return student


def calibration_blocks(dataset: Dataset[Any], num_tokens: int = CALIBRATION_TOKENS) -> torch.Tensor:
    """The first blocks of the training text ``[N, T]`` that hold this many tokens."""
    length = len(dataset[0]["input_ids"])
    count = min(-(-num_tokens // length), len(dataset))  # type: ignore[arg-type]
    return torch.stack([dataset[i]["input_ids"] for i in range(count)])


def _run_step(work: _Work, step: Step, student: HybridForCausalLM) -> None:
    """One stage, or the weights that it left when it was done before."""
    recipe, processes = work.recipe, work.processes
    set_seed(recipe.seed)
    directory = work.run / "stages" / step.name
    module = stage_module(step.stage, student, work.teacher)
    if processes.first_does(lambda: (directory / _SUMMARY).is_file()):
        processes.all_do(lambda: load_trained(module, directory / _TRAINED))
        return
    arguments = training_arguments(
        step.stage,
        recipe,
        directory,
        context_length=recipe.data.context_length,
        device=processes.device,
        count=processes.count,
    )
    start = time.perf_counter()
    begun = processes.first_does(lambda: last_complete_checkpoint(directory) is not None)
    if isinstance(step.stage, Align) and not begun:
        _calibrate(work, student, step.stage.calibration_tokens, step.name)
    processes.share(trained_parameters(module).values())
    training = module if processes.sharding is None else shard(module, processes, bfloat16=work.bfloat16)

    sequences = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes.count
    tokens_per_step = sequences * recipe.data.context_length
    no_graphs = why_no_graphs(recipe, step.stage, processes)
    how = {"processes": processes.count, "sharded": processes.sharding is not None, "cuda_graphs": no_graphs is None}
    log = MetricsLog(work.run / "metrics.jsonl", step.name, tokens_per_step, work.listener)
    if processes.first:
        graphs = "recorded as a CUDA graph" if no_graphs is None else f"not recorded as a CUDA graph ({no_graphs})"
        work.announce(f"{step.name}: {processes.describe()}; each step {graphs}")
    trainer = build_trainer(
        step.stage,
        training,
        arguments,
        work.dataset,
        [log] if processes.first else [],
        processes=processes,
        cuda_graphs=no_graphs is None,
    )
    train_stage(trainer)
    seconds = time.perf_counter() - start
    if training is not module:
        copy_trained(training, module, processes.device)
    save_trained(module, directory / _TRAINED, processes)
    steps = trainer.state.global_step
    summary = {"stage": step.name, "steps": steps, "tokens": steps * tokens_per_step, "seconds": round(seconds, 2)}

    def conclude() -> None:
        write_json(directory / _SUMMARY, summary | {"attention": step.attention} | how)
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    processes.first_does(conclude)


def _calibrate(work: _Work, student: HybridForCausalLM, num_tokens: int, stage: str) -> None:
    """The align stage's closed-form start; its errors go to the metrics as step 0."""
    if not num_tokens:
        return
    blocks = calibration_blocks(work.dataset, num_tokens).to(work.processes.device)
    with _within_reach(student, work.teacher, work.processes):
        errors = calibrate(student, work.teacher, blocks.split(8))
    rows = []
    for step, column in ((-1, 0), (0, 1)):
        row = {f"layer_{i:02d}": error[column] for i, error in errors.items()}
        rows.append({"stage": stage, "step": step, "tokens": 0, "loss": sum(row.values()) / len(row)} | row)

    def write() -> None:
        path = work.run / "metrics.jsonl"
        forget_after(path, stage, -1)
        for row in rows:
            append_jsonl(path, row)

    work.processes.first_does(write)


@contextmanager
def _within_reach(student: HybridForCausalLM, teacher: HybridForCausalLM, processes: Processes) -> Iterator[None]:
    """While open, models in host memory compute on the device: the teacher part by part, the new mixers at once."""
    if processes.home == processes.device:
        yield
        return
    parts = [child for block in teacher.model.layers for child in block.children()]
    mixers = [student.model.layers[i].mixer for i in student.config.converted_layers]
    for mixer in mixers:
        mixer.to(processes.device)
    try:
        with lent([teacher.model.embed_tokens, *parts], processes.device):
            yield
    finally:
        for mixer in mixers:
            mixer.to(processes.home)


def summaries(run: Path) -> list[dict[str, Any]]:
    """What each finished stage took: steps, tokens, seconds."""
    return [read_json(path) for path in sorted(run.glob(f"stages/*/{_SUMMARY}"))]
