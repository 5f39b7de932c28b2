"""Runs a recipe's stages in one directory, from wherever an earlier run of the same recipe stopped.

RUN/recipe.yaml          the recipe with every default written out
RUN/environment.json     versions, device, command
RUN/metrics.jsonl        one line a log event, all stages
RUN/stages/01-align/     checkpoints, TensorBoard events; trained.safetensors and summary.json once done
RUN/student/             the final model
"""

from __future__ import annotations

import copy
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import set_seed

from mambify import __version__
from mambify.conversion import apply_plan, calibrate, plan
from mambify.distill.logs import Listener, MetricsLog, forget_after
from mambify.distill.recipe import Align, Recipe, Stage, dump_recipe
from mambify.distill.stages import (
    build_trainer,
    stage_module,
    train_stage,
    training_arguments,
    unshare_mlps,
    use_bfloat16,
)
from mambify.distill.trainer import last_complete_checkpoint, load_trained, save_trained
from mambify.errors import OutputExistsError
from mambify.families.load import LoadedModel, save
from mambify.io import append_jsonl, atomic_write_text, read_json, write_json
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


def open_run(recipe: Recipe, *, overwrite: bool = False) -> Path:
    """The run directory: new, or that of an earlier run of the same recipe.

    Raises:
        OutputExistsError: something else is there.
    """
    run, text = Path(recipe.output), dump_recipe(recipe)
    if overwrite and run.exists():
        shutil.rmtree(run)
    existing = run / "recipe.yaml"
    if existing.is_file():
        if existing.read_text(encoding="utf-8") != text:
            raise OutputExistsError(f"{run} holds a run of another recipe: choose another output or pass --overwrite")
        return run
    if run.exists() and any(run.iterdir()):
        raise OutputExistsError(f"{run} is not empty and no run: choose another output or pass --overwrite")
    atomic_write_text(existing, text)
    write_json(run / "environment.json", _environment())
    return run


def run_stages(
    recipe: Recipe,
    run: Path,
    *,
    teacher: LoadedModel,
    dataset: Dataset[Any],
    device: str,
    listener: Listener | None = None,
) -> HybridForCausalLM:
    """Converts and trains through every stage, skipping those that are done; saves and returns the student.

    What is frozen is computed in the recipe's precision; where that is not the teacher's own dtype, a copy in it is
    made for the run, and the student that is saved keeps the teacher's weights as they were.

    Args:
        run: what :func:`open_run` gave.
        teacher: anywhere; it is only read.
        dataset: blocks of ``recipe.data.context_length`` tokens.
        device: where to train.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite.
        OutputWriteError: the disk refused a write; what was written before is whole.
    """
    bfloat16 = use_bfloat16(recipe.precision, device)
    working = in_dtype(teacher.model, torch.bfloat16 if bfloat16 else torch.float32, device)
    student = working
    for step in steps_of(recipe):
        student = _converted(student, recipe, step.attention)
        directory = run / "stages" / step.name
        _run_step(recipe, step, run, directory, student, working, dataset, listener)
    final = _final_student(recipe, teacher.model, student)
    if not (run / "student").is_dir():
        save(final, run / "student", tokenizer=teacher.tokenizer)
    return final


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


def _converted(model: HybridForCausalLM, recipe: Recipe, attention: float) -> HybridForCausalLM:
    """``model`` with the layers of this attention share converted; new mixers are float32 masters."""
    planned = plan(
        model.config,
        mixer=recipe.student.mixer,
        attention=attention,
        attention_layers=recipe.student.attention_layers,
        init=recipe.student.init,
    )
    student = apply_plan(model, planned, seed=recipe.seed) if planned.converted else model
    for index in planned.converted:
        student.model.layers[index].mixer.float()
    return student


def _run_step(
    recipe: Recipe,
    step: Step,
    run: Path,
    directory: Path,
    student: HybridForCausalLM,
    teacher: HybridForCausalLM,
    dataset: Dataset[Any],
    listener: Listener | None,
) -> None:
    """One stage, or the weights that it left when it was done before."""
    set_seed(recipe.seed)
    module = stage_module(step.stage, student, teacher)
    if (directory / _SUMMARY).is_file():
        load_trained(module, directory / _TRAINED)
        return
    context_length = recipe.data.context_length
    arguments = training_arguments(
        step.stage, recipe, directory, context_length=context_length, device=teacher.device.type
    )
    sequences = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    tokens_per_step = sequences * context_length
    log = MetricsLog(run / "metrics.jsonl", step.name, tokens_per_step, listener)
    trainer = build_trainer(step.stage, module, arguments, dataset, [log], cuda_graphs=recipe.cuda_graphs)
    start = time.perf_counter()
    if isinstance(step.stage, Align) and last_complete_checkpoint(directory) is None:
        _calibrate(student, teacher, dataset, step.stage.calibration_tokens, run, step.name)
    train_stage(trainer)
    seconds = time.perf_counter() - start
    save_trained(module, directory / _TRAINED)
    steps = trainer.state.global_step
    summary = {"stage": step.name, "steps": steps, "tokens": steps * tokens_per_step, "seconds": round(seconds, 2)}
    write_json(directory / _SUMMARY, summary | {"attention": step.attention})
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _calibrate(
    student: HybridForCausalLM,
    teacher: HybridForCausalLM,
    dataset: Dataset[Any],
    num_tokens: int,
    run: Path,
    stage: str,
) -> None:
    """The align stage's closed-form start; its errors go to the metrics as step 0."""
    if not num_tokens:
        return
    length = len(dataset[0]["input_ids"])
    count = min(-(-num_tokens // length), len(dataset))  # type: ignore[arg-type]
    blocks = torch.stack([dataset[i]["input_ids"] for i in range(count)]).to(teacher.device)
    errors = calibrate(student, teacher, blocks.split(8))
    path = run / "metrics.jsonl"
    forget_after(path, stage, -1)
    for step, column in ((-1, 0), (0, 1)):
        row = {f"layer_{i:02d}": error[column] for i, error in errors.items()}
        loss = sum(row.values()) / len(row)
        append_jsonl(path, {"stage": stage, "step": step, "tokens": 0, "loss": loss} | row)


def summaries(run: Path) -> list[dict[str, Any]]:
    """What each finished stage took: steps, tokens, seconds."""
    return [read_json(path) for path in sorted(run.glob(f"stages/*/{_SUMMARY}"))]


def _environment() -> dict[str, Any]:
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "command": sys.argv,
        "mambify": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
        "num_threads": torch.get_num_threads(),
    }
