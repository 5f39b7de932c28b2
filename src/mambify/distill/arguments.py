"""From one stage of a recipe to the Trainer's arguments, and what is refused before anything is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from mambify.distill.muon import Muon
from mambify.distill.parallel import Processes, process_count, sharding_asked_for, uses_deepspeed
from mambify.distill.recipe import Recipe
from mambify.distill.settings import Dpo, OnPolicy, Stage
from mambify.errors import MissingDependencyError, RecipeError, UnsupportedError, did_you_mean

_SCORES_NOTHING = "has no effect: a stage only trains, and the student is scored by mambify evaluate"
#: what a stage's ``trainer`` may not hold, and where it is said instead
_ELSEWHERE = {
    "output_dir": "is the recipe's output",
    "logging_dir": "is in the recipe's output",
    "max_steps": "is the stage's tokens over its batch_tokens",
    "num_train_epochs": "is the stage's tokens, which are read again where there are fewer",
    "per_device_train_batch_size": "is the stage's micro_batch",
    "gradient_accumulation_steps": "is the stage's batch_tokens over its micro_batch",
    "learning_rate": "is the stage's own learning_rate",
    "warmup_steps": "is the stage's warmup",
    "warmup_ratio": "is the stage's warmup",
    "lr_scheduler_type": "is the stage's schedule",
    "weight_decay": "is the stage's own weight_decay",
    "adam_beta1": "is the first of the stage's betas",
    "adam_beta2": "is the second of the stage's betas",
    "max_grad_norm": "is the stage's clip",
    "bf16": "is the recipe's precision",
    "fp16": "is none: the recipe's precision is float32 or bfloat16",
    "use_cpu": "is said when a run is started: --device cpu",
    "seed": "is the recipe's seed",
    "logging_steps": "is the recipe's log_every",
    "save_steps": "is the recipe's checkpoint_every",
    "report_to": "is the recipe's report_to",
    "eval_strategy": _SCORES_NOTHING,
    "eval_steps": _SCORES_NOTHING,
    "do_eval": _SCORES_NOTHING,
    "load_best_model_at_end": _SCORES_NOTHING,
    "gradient_checkpointing": "is a key of the stage itself",
    "activation_checkpointing": "is the stage's own gradient_checkpointing",
    "average_tokens_across_devices": "is always so: a step's tokens count alike on all processes",
} | dict.fromkeys(
    ("fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
    "is said when a run is started: accelerate launch --config_file FILE",
)
#: optimizers that step inside the backward pass, choose layers by themselves, or train other weights than they keep
_OWN_WAYS = ("adalomo", "apollo", "galore", "lomo", "schedule_free")
#: those whose state PyTorch can spread over processes
_SPREADABLE = ("adamw_torch", "adamw_torch_fused", "sgd")


def item_tokens(stage: Stage, recipe: Recipe) -> int:
    """Tokens of what a stage's data set holds under one index: a sequence, or the two of a pair."""
    return recipe.data_of(stage).context_length * stage.rows


def micro_batches(stage: Stage, item_tokens: int, count: int) -> tuple[int, int]:
    """How a step is cut: sequences of a micro-batch, and micro-batches of each of ``count`` processes.

    Args:
        item_tokens: of a sequence (of the two sequences of a pair).
        count: processes that share each step.

    Raises:
        RecipeError: it cannot be cut evenly, or all the stage's tokens do not make one.
    """
    noun = "pairs" if stage.rows == 2 else "sequences"
    items, rest = divmod(stage.batch_tokens, item_tokens)
    if rest or not items:
        nearest = max(round(stage.batch_tokens / item_tokens), 1) * item_tokens
        raise RecipeError(
            f"stage {stage.kind}: batch_tokens {stage.batch_tokens} is no whole number of {noun} of {item_tokens}: the "
            f"nearest that is one is {nearest}"
        )
    share, rest = divmod(items, count)
    if rest or not share:
        nearest = max(round(items / count), 1) * count * item_tokens
        raise RecipeError(
            f"stage {stage.kind}: batch_tokens {stage.batch_tokens} is {items} {noun} of {item_tokens}, "
            f"which {count} processes cannot share evenly: the nearest that they can is {nearest}"
        )
    micro = min(stage.micro_batch or share, share)
    if share % micro:
        nearest = min((n for n in range(1, share + 1) if share % n == 0), key=lambda n: abs(n - micro))
        each = "" if count == 1 else " of each process"
        raise RecipeError(
            f"stage {stage.kind}: micro_batch {micro} does not divide the {share} {noun}{each} in a step: "
            f"the nearest that does is {nearest}"
        )
    if stage.tokens < stage.batch_tokens:
        raise RecipeError(
            f"stage {stage.kind}: {stage.tokens} tokens are less than the {stage.batch_tokens} of one step: raise "
            "tokens or lower batch_tokens"
        )
    return micro, share // micro


def training_arguments(
    stage: Stage, recipe: Recipe, directory: Path, *, device: str, count: int = 1
) -> TrainingArguments:
    """The Trainer's arguments; ``stage.trainer`` may set most of them by name.

    Args:
        device: ``cpu`` or a GPU.
        count: processes that share each step.

    Raises:
        RecipeError: a step that cannot be cut evenly; ``trainer`` holds a key that TrainingArguments has not, or one
            that is said elsewhere.
    """
    tokens = item_tokens(stage, recipe)
    micro, accumulation = micro_batches(stage, tokens, count)
    steps = stage.tokens // (micro * accumulation * count * tokens)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key in stage.trainer:
        if key not in known:
            raise RecipeError(f"unknown key 'trainer.{key}': {did_you_mean(key, known)}")
        if key in _ELSEWHERE:
            raise RecipeError(f"key 'trainer.{key}' has no place there: it {_ELSEWHERE[key]}")
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
    if stage.schedule == "warmup_stable_decay":
        settings["lr_scheduler_kwargs"] = {
            "num_decay_steps": max(round(stage.decay * steps), 1),
            "min_lr_ratio": stage.min_learning_rate,
            "decay_type": "linear",
        }
    arguments = TrainingArguments(**settings | stage.trainer)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the Trainer would spread each step over all GPUs by nn.DataParallel
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"  # the recipe's word, not the launcher's
    return arguments


def check_launch(recipe: Recipe) -> None:
    """Refuses, before any process waits for another, what this number of processes cannot do with the recipe.

    Raises:
        RecipeError: a step that cannot be cut evenly.
        UnsupportedError: a kind of sharding, a stage under it, or a way of compiling that is not offered.
    """
    count = process_count()
    for stage in recipe.stages:
        micro_batches(stage, item_tokens(stage, recipe), count)
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise UnsupportedError("torch.compile is for the recipe to ask for: trainer.torch_compile of stage kd")
    sharding = sharding_asked_for() if count > 1 else None
    if sharding is not None and recipe.student.features:
        raise UnsupportedError("student.features: a draft that reads hidden states takes whole weights, not shards")
    for stage in recipe.stages:
        reason = _why_no_deepspeed(stage) if uses_deepspeed() else None
        if reason is not None:
            raise UnsupportedError(f"stage {stage.kind} {reason}, which DeepSpeed's engine does not allow: use FSDP")
        if sharding is not None and isinstance(stage, OnPolicy):
            raise UnsupportedError("stage on_policy has the student write texts, which takes whole weights, not shards")
        if sharding is not None and stage.optimizer == "muon":
            raise UnsupportedError(f"stage {stage.kind}: optimizer muon needs whole matrices, not shards: choose adamw")
        if sharding is not None and stage.trainer.get("torch_compile"):
            raise UnsupportedError(f"stage {stage.kind}: torch_compile does not go with sharded weights")
        if sharding is not None and stage.trainer.get("optim", "adamw_torch") not in _SPREADABLE:
            raise UnsupportedError(
                f"stage {stage.kind}: optimizer {stage.trainer['optim']} does not go with sharded weights: "
                f"choose one of {', '.join(_SPREADABLE)}"
            )


def _why_no_deepspeed(stage: Stage) -> str | None:
    """What the stage does that DeepSpeed's engine has no place for."""
    reasons = {
        "takes a backward pass for each layer": stage.layerwise,
        "counts pairs, not tokens": isinstance(stage, Dpo),
        "has the student write texts between two steps": isinstance(stage, OnPolicy),
        "averages weights": bool(stage.ema),
        "makes matrices' steps orthogonal": stage.optimizer == "muon",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def check_training_arguments(recipe: Recipe, processes: Processes) -> None:
    """Refuses settings that the Trainer would refuse later, before anything is written.

    Raises:
        RecipeError: see :func:`training_arguments`; or a value that TrainingArguments does not take.
        MissingDependencyError: an optimizer or a reporter of a package that is not installed.
    """
    for stage in recipe.stages:
        try:
            arguments = training_arguments(
                stage,
                recipe,
                Path(recipe.output),
                device=processes.device,
                count=processes.count,
            )
            optimizer_class(stage, arguments)
            for reporter in get_reporting_integration_callbacks(arguments.report_to):
                _require_installed(reporter)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"stage {stage.kind}: {str(error).splitlines()[0]}") from error
        except ImportError as error:
            raise MissingDependencyError(f"stage {stage.kind}: {str(error).splitlines()[0]}") from error
        if arguments.dataloader_num_workers and isinstance(stage, OnPolicy):
            raise RecipeError("stage on_policy: the student writes its text here: set dataloader_num_workers to 0")
        if arguments.torch_compile and stage.layerwise:
            raise RecipeError(f"stage {stage.kind}: torch_compile is for whole models; a layer leaves it little to do")


def _require_installed(reporter: type[TrainerCallback]) -> None:
    """Raises ImportError where the package that a reporter writes for is missing, as its constructor finds out."""
    try:
        reporter()
    except RuntimeError as error:
        raise ImportError(str(error)) from error


def optimizer_class(stage: Stage, arguments: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The stage's optimizer, or the one that its ``trainer.optim`` names, and its arguments.

    Raises:
        ValueError: one that goes its own ways with layers or steps; two at once.
        ImportError: its package is not installed.
    """
    if stage.optimizer == "muon":
        if "optim" in stage.trainer:
            raise ValueError(f"trainer.optim {stage.trainer['optim']} and optimizer muon exclude each other")
        return Muon, {"lr": stage.learning_rate, "betas": stage.betas}
    name = str(arguments.optim.value)
    if name.startswith(_OWN_WAYS):
        raise ValueError(f"optimizer {name} is not supported: choose one that steps once all gradients are in")
    found: tuple[type[torch.optim.Optimizer], dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return found


def why_no_graphs(recipe: Recipe, stage: Stage, processes: Processes) -> str | None:
    """Why this stage's step is not recorded as a CUDA graph; ``None`` where it is."""
    reasons = {
        "the recipe says so": not recipe.cuda_graphs,
        "they need a GPU": not processes.device.startswith("cuda"),
        "weights are sharded": processes.sharding is not None,
        "documents are packed": recipe.data_of(stage).packing == "documents",
        "gradient checkpointing is on": bool(getattr(stage, "gradient_checkpointing", False)),
        "torch_compile is on": bool(stage.trainer.get("torch_compile")),
        "DeepSpeed is used": uses_deepspeed(),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


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
