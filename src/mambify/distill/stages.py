"""From one stage of a recipe to the module that trains, its parameters, and the Trainer's arguments."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from mambify.distill.align import MixerAligner
from mambify.distill.kd import KnowledgeDistiller, collate
from mambify.distill.recipe import Align, Kd, Recipe, Stage
from mambify.distill.trainer import StageTrainer, last_complete_checkpoint
from mambify.errors import InvalidOptionError, RecipeError, UnsupportedError, did_you_mean
from mambify.model import HybridForCausalLM

_MLP = "mlp"


def stage_module(stage: Stage, student: HybridForCausalLM, teacher: HybridForCausalLM) -> nn.Module:
    """The module that this stage trains, with ``requires_grad`` set on what it trains and on nothing else."""
    layers = student.config.converted_layers
    if not layers:
        raise InvalidOptionError(f"stage {stage.kind} has nothing to train: no layer of the student is converted")
    student.requires_grad_(False)
    for index in layers:
        student.model.layers[index].mixer.requires_grad_(True)
    if isinstance(stage, Align):
        return MixerAligner(student, teacher, layers)
    _set_checkpointing(student, stage.gradient_checkpointing)
    if stage.mlp_learning_rate:
        unshare_mlps(student, teacher)
        for block in student.model.layers:
            block.mlp.requires_grad_(True)
    return KnowledgeDistiller(
        student,
        teacher,
        kl_weight=stage.kl_weight,
        ce_weight=stage.ce_weight,
        temperature=stage.temperature,
    )


def _set_checkpointing(student: HybridForCausalLM, wanted: bool) -> None:
    """Turns gradient checkpointing on or off; transformers renamed its methods after 5.17."""
    if student.model.gradient_checkpointing == wanted:
        return
    action = "enable" if wanted else "disable"
    renamed = getattr(student, f"activation_checkpointing_{action}", None)
    (renamed or getattr(student, f"gradient_checkpointing_{action}"))()


def unshare_mlps(student: HybridForCausalLM, teacher: HybridForCausalLM) -> None:
    """Gives the student MLPs of its own, before they are trained; the teacher's must stay what they are."""
    for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        if ours.mlp is theirs.mlp:
            ours.mlp = copy.deepcopy(theirs.mlp)


def parameter_groups(stage: Stage, module: nn.Module) -> list[dict[str, Any]]:
    """What trains, by learning rate; weight decay on matrices only."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        in_mlp = isinstance(stage, Kd) and f".{_MLP}." in name
        rate = stage.mlp_learning_rate if isinstance(stage, Kd) and in_mlp else stage.learning_rate
        decay = stage.weight_decay if parameter.dim() == 2 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def training_arguments(
    stage: Stage, recipe: Recipe, directory: Path, *, context_length: int, device: str
) -> TrainingArguments:
    """The Trainer's arguments; ``stage.trainer`` may set any of them by name.

    Raises:
        RecipeError: ``trainer`` holds a key that TrainingArguments has not; or a batch smaller than one sequence.
    """
    sequences = max(stage.batch_tokens // context_length, 1)
    micro = min(stage.micro_batch or sequences, sequences)
    accumulation = -(-sequences // micro)
    steps = max(stage.tokens // (micro * accumulation * context_length), 1)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key in stage.trainer:
        if key not in known:
            raise RecipeError(f"unknown key 'trainer.{key}': {did_you_mean(key, known)}")
    on_cpu = device == "cpu"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(directory / "tensorboard")
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": stage.learning_rate,
        "warmup_steps": int(stage.warmup if stage.warmup >= 1 else stage.warmup * steps),
        "lr_scheduler_type": stage.schedule,
        "weight_decay": stage.weight_decay,
        "adam_beta1": stage.betas[0],
        "adam_beta2": stage.betas[1],
        "max_grad_norm": stage.clip,
        "bf16": use_bfloat16(recipe.precision, device),
        "use_cpu": on_cpu,
        "seed": recipe.seed,
        "logging_steps": recipe.log_every,
        "logging_nan_inf_filter": False,
        "save_steps": recipe.checkpoint_every,
        "save_total_limit": 2,
        "report_to": available_reporters(recipe.report_to),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu,
        "label_names": ["labels"],
        "optim": "adamw_torch" if on_cpu else "adamw_torch_fused",
    }
    if stage.schedule == "cosine_with_min_lr":
        settings["lr_scheduler_kwargs"] = {"min_lr_rate": stage.min_learning_rate}
    arguments = TrainingArguments(**settings | stage.trainer)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the Trainer would spread each step over all GPUs by nn.DataParallel
    return arguments


def check_training_arguments(recipe: Recipe, *, device: str) -> None:
    """Refuses settings that the Trainer would refuse later, before anything is written.

    Raises:
        RecipeError: see :func:`training_arguments`; or a value that TrainingArguments does not take.
        UnsupportedError: started as one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError("distilling in several processes is not supported yet: start it as one")
    for stage in recipe.stages:
        try:
            training_arguments(
                stage, recipe, Path(recipe.output), context_length=recipe.data.context_length, device=device
            )
        except (TypeError, ValueError) as error:
            raise RecipeError(f"stage {stage.kind}: {str(error).splitlines()[0]}") from error


def use_bfloat16(precision: str, device: str) -> bool:
    """Whether matrix products run in bfloat16: as asked, or where the hardware has instructions for it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return bool(torch.cuda.is_bf16_supported())


def available_reporters(wanted: list[str]) -> list[str]:
    """``wanted`` without TensorBoard where that is the default and not installed; all else is the user's word."""
    if wanted == ["tensorboard"] and importlib.util.find_spec("tensorboard") is None:
        return []
    return wanted


def build_trainer(
    stage: Stage,
    module: nn.Module,
    arguments: TrainingArguments,
    dataset: Any,
    callbacks: list[TrainerCallback],
    *,
    cuda_graphs: bool,
) -> StageTrainer:
    """The trainer of a stage, with an AdamW over :func:`parameter_groups`."""
    optimizer = torch.optim.AdamW(
        parameter_groups(stage, module),
        lr=stage.learning_rate,
        betas=stage.betas,
        fused=arguments.optim == "adamw_torch_fused",
    )
    trainer = StageTrainer(
        model=module,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        callbacks=callbacks,
        optimizers=(optimizer, None),
        cuda_graphs=cuda_graphs
        and arguments.device.type == "cuda"
        and arguments.world_size == 1
        and not getattr(stage, "gradient_checkpointing", False),
    )
    for callback in (c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"):
        trainer.remove_callback(callback)
    return trainer


def train_stage(trainer: StageTrainer) -> None:
    """Trains to the end, from the newest whole checkpoint where there is one."""
    checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.require_finite()
