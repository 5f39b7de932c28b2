"""Runs a recipe's stages in one directory, from wherever an earlier run of the same recipe stopped.

    RUN/recipe.yaml          the recipe with every default written out
    RUN/environment.json     versions, device, command
    RUN/metrics.jsonl        one line a log event, all stages
    RUN/stages/01-align/     checkpoints, TensorBoard events; trained.safetensors and summary.json once done
    RUN/student/             the final model
"""

from __future__ import annotations

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
from transformers import PreTrainedTokenizerBase, set_seed

from mambify import __version__
from mambify.conversion import apply_plan, calibrate, plan
from mambify.distill.logs import Listener, MetricsLog, forget_after
from mambify.distill.recipe import Align, Recipe, Stage, dump_recipe
from mambify.distill.stages import build_trainer, stage_module, train_stage, training_arguments
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
            raise OutputExistsError(
                f"{run} holds a run of another recipe: choose another output or pass --overwrite"
            )
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
    listener: Listener | None = None,
) -> HybridForCausalLM:
    """Converts and trains through every stage, skipping those that are done; saves and returns the student.

    Args:
        run: what :func:`open_run` gave.
        teacher: on the device that trains.
        dataset: blocks of ``recipe.data.context_length`` tokens.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite.
        OutputWriteError: the disk refused a write; what was written before is whole.
    """
    student = teacher.model
    for step in steps_of(recipe):
        student = _converted(student, recipe, step.attention)
        directory = run / "stages" / step.name
        _run_step(recipe, step, run, directory, student, teacher.model, dataset, listener)
    student.requires_grad_(True)
    if not (run / "student").is_dir():
        save(student, run / "student", tokenizer=teacher.tokenizer)
    return student


def _converted(model: HybridForCausalLM, recipe: Recipe, attention: float) -> HybridForCausalLM:
    planned = plan(
        model.config,
        mixer=recipe.student.mixer,
        attention=attention,
        attention_layers=recipe.student.attention_layers,
        init=recipe.student.init,
    )
    student = apply_plan(model, planned, seed=recipe.seed) if planned.converted else model
    for index in planned.converted:  # masters in float32, whatever the teacher is kept in
        student.model.layers[index].mixer.float()  # type: ignore[union-attr]
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
    trainer = build_trainer(step.stage, module, arguments, dataset, [log])
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
