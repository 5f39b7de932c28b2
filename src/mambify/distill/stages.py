"""From one stage of a recipe to the module that trains, its parameters, and the Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from mambify.config import HybridConfig
from mambify.distill.align import MixerAligner
from mambify.distill.arguments import item_tokens, optimizer_class
from mambify.distill.checkpoints import last_complete_checkpoint
from mambify.distill.dpo import PreferenceTuner
from mambify.distill.features import FeatureDistiller
from mambify.distill.hidden import HiddenAligner
from mambify.distill.kd import KnowledgeDistiller
from mambify.distill.losses import IGNORE
from mambify.distill.mixing import MatrixAligner
from mambify.distill.parallel import Processes
from mambify.distill.recipe import Recipe
from mambify.distill.settings import (
    Align,
    Dpo,
    EndToEnd,
    Hidden,
    Kd,
    Mixing,
    OnPolicy,
    Sft,
    Stage,
    StageSettings,
)
from mambify.distill.sft import SupervisedTuner
from mambify.distill.trainer import DistillationStage, StageTrainer
from mambify.errors import CheckpointError, InvalidOptionError
from mambify.mixers import AttentionMixer, Mixer
from mambify.model import GatedMLP, HybridBlock, HybridForCausalLM

# ---- kind → module -------------------------------------------------------------------------------------------------


def stage_module(
    stage: Stage, student: HybridForCausalLM, teacher: HybridForCausalLM, base: HybridForCausalLM | None = None
) -> DistillationStage:
    """The module that this stage trains, with ``requires_grad`` set on what it trains and on nothing else.

    Args:
        teacher: whose distribution the student learns.
        base: what the student was made from, which stages learn from that go layer by layer; the teacher by default.
    """
    base = teacher if base is None else base
    if not (_layers_to_learn(student, base) if stage.layerwise else trains_something(stage, student.config)):
        raise InvalidOptionError(f"stage {stage.kind} has nothing to train: no layer of the student is converted")
    for model in (teacher, base, student):
        model.requires_grad_(False)
    for part in stage.learning_rates:
        unshare(student, base, part)
        for module in modules_of(student, part):
            module.float().requires_grad_(True)
    _set_checkpointing(student, isinstance(stage, EndToEnd) and stage.gradient_checkpointing)
    return _MODULES[type(stage)](stage, student, base if stage.layerwise else teacher)


def trains_something(stage: Stage, config: HybridConfig) -> bool:
    """Whether a student of this configuration has what the stage trains: new mixers, or its other parts too."""
    return bool(config.converted_layers) or any(part != "mixer" for part in stage.learning_rates)


def _layers_to_learn(student: HybridForCausalLM, base: HybridForCausalLM) -> list[int]:
    """The converted layers whose place in the base is held by attention, which they can learn from."""
    layers = student.config.converted_layers
    return [i for i in layers if isinstance(base.model.layers[i].mixer, AttentionMixer)]


def _align(stage: Align, student: HybridForCausalLM, base: HybridForCausalLM) -> DistillationStage:
    return MixerAligner(student, base, _layers_to_learn(student, base), l2=stage.loss == "l2")


def _mixing(stage: Mixing, student: HybridForCausalLM, base: HybridForCausalLM) -> DistillationStage:
    return MatrixAligner(student, base, _layers_to_learn(student, base))


def _hidden(stage: Hidden, student: HybridForCausalLM, base: HybridForCausalLM) -> DistillationStage:
    return HiddenAligner(student, base, _layers_to_learn(student, base))


def _distil(stage: Kd | OnPolicy, student: HybridForCausalLM, teacher: HybridForCausalLM) -> DistillationStage:
    names = ("kl_weight", "reverse_kl_weight", "ce_weight", "tv_weight", "temperature")
    options = {name: getattr(stage, name) for name in names}
    if isinstance(stage, Kd) and student.config.draft_features:
        return FeatureDistiller(student, teacher, unroll=stage.unroll, decay=stage.unroll_decay, **options)
    return KnowledgeDistiller(student, teacher, **options)


def _sft(stage: Sft, student: HybridForCausalLM, teacher: HybridForCausalLM) -> DistillationStage:
    if stage.kl_weight:
        return KnowledgeDistiller(student, teacher, kl_weight=stage.kl_weight, ce_weight=1.0)
    return SupervisedTuner(student)


def _dpo(stage: Dpo, student: HybridForCausalLM, teacher: HybridForCausalLM) -> DistillationStage:
    return PreferenceTuner(
        student,
        teacher if stage.reference == "teacher" else frozen_copy(student),
        beta=stage.beta,
        label_smoothing=stage.label_smoothing,
        sft_weight=stage.sft_weight,
        kl_weight=stage.kl_weight,
    )


_MODULES: dict[type[StageSettings], Callable[[Any, HybridForCausalLM, HybridForCausalLM], DistillationStage]] = {
    Align: _align,
    Mixing: _mixing,
    Hidden: _hidden,
    Kd: _distil,
    OnPolicy: _distil,
    Sft: _sft,
    Dpo: _dpo,
}


def _set_checkpointing(student: HybridForCausalLM, wanted: bool) -> None:
    """Turns gradient checkpointing on or off; transformers renamed its methods after 5.17."""
    if student.model.gradient_checkpointing == wanted:
        return
    action = "enable" if wanted else "disable"
    renamed = getattr(student, f"activation_checkpointing_{action}", None)
    (renamed or getattr(student, f"gradient_checkpointing_{action}"))()


# ---- what trains ---------------------------------------------------------------------------------------------------


def modules_of(student: HybridForCausalLM, part: str) -> Iterator[nn.Module]:
    """``mixer``: the new mixers. ``mlp``: the MLPs. ``rest``: kept attention and norms, and what
    reads hidden states in a draft.

    Embeddings and head belong to no part: they stay the base's, often as one tensor, and the losses count on it.
    """
    if part == "rest":
        yield student.model.norm
        if student.model.feature_input is not None:
            yield student.model.feature_input
    for block in student.model.layers:
        assert isinstance(block, HybridBlock)
        kept = isinstance(block.mixer, AttentionMixer)
        if part == "mlp" and block.mlp is not None:
            yield block.mlp
        if part == "rest":
            yield block.input_layernorm
            if block.post_attention_layernorm is not None:
                yield block.post_attention_layernorm
        if part == ("rest" if kept else "mixer"):
            yield block.mixer


def unshare(student: HybridForCausalLM, base: HybridForCausalLM, part: str) -> None:
    """Gives the student modules of its own where it has the base's, before they train: the base must not change."""
    theirs = set(base.modules())
    wanted = {child for module in modules_of(student, part) for child in module.modules()}
    for parent in list(student.modules()):
        for name, child in list(parent.named_children()):
            if child in wanted and child in theirs:
                setattr(parent, name, copy.deepcopy(child))


def frozen_copy(student: HybridForCausalLM, dtype: torch.dtype | None = None) -> HybridForCausalLM:
    """The student as it is now, for a while: what trains is copied, what is frozen is the same modules.

    Args:
        dtype: cast to it; a frozen module of another dtype is copied as well.
    """
    memo: dict[int, object] = {}
    for module in student.modules():
        parameters = list(module.parameters(recurse=False))
        leaf = bool(parameters) and not any(True for _ in module.children())
        if leaf and all(not p.requires_grad and dtype in (None, p.dtype) for p in parameters):
            memo[id(module)] = module
    twin: HybridForCausalLM = copy.deepcopy(student, memo).requires_grad_(False).eval()
    return twin if dtype is None else twin.to(dtype=dtype)


def parameter_groups(stage: Stage, module: nn.Module) -> list[dict[str, Any]]:
    """What trains, by learning rate; only weights of linear layers have weight decay, and Muon where that is chosen."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    modules = dict(module.named_modules())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = stage.learning_rates[_part_of(name, modules)]
            # A matrix by its shape alone may be none: Mamba1's A_log holds a decay rate for every channel and state.
            linear = parameter.dim() == 2 and isinstance(modules[name.rpartition(".")[0]], nn.Linear)
            groups.setdefault((rate, linear), []).append(parameter)
    muon = {"muon": True} if stage.optimizer == "muon" else {}
    return [
        {"params": ps, "lr": rate, "weight_decay": stage.weight_decay if matrices else 0.0} | (muon if matrices else {})
        for (rate, matrices), ps in groups.items()
    ]


def _part_of(name: str, modules: dict[str, nn.Module]) -> str:
    """The part that a parameter belongs to, by the module it is in."""
    while name:
        name = name.rpartition(".")[0]
        if isinstance(modules[name], AttentionMixer):
            return "rest"
        if isinstance(modules[name], Mixer):
            return "mixer"
        if isinstance(modules[name], GatedMLP):
            return "mlp"
    return "rest"


# ---- training ------------------------------------------------------------------------------------------------------


def build_trainer(
    stage: Stage,
    recipe: Recipe,
    module: DistillationStage,
    arguments: TrainingArguments,
    dataset: Any,
    callbacks: list[TrainerCallback],
    *,
    processes: Processes,
    cuda_graphs: bool,
) -> StageTrainer:
    """The trainer of a stage, with an optimizer over :func:`parameter_groups`."""
    optimizer, options = optimizer_class(stage, arguments)
    trainer = StageTrainer(
        model=module,
        args=arguments,
        train_dataset=dataset,
        # What is recorded or compiled is so for one shape.
        data_collator=collate if cuda_graphs or arguments.torch_compile else collate_shortened,
        callbacks=callbacks,
        optimizers=(optimizer(parameter_groups(stage, module), **options), None),
        processes=processes,
        item_tokens=item_tokens(stage, recipe),
        in_order=isinstance(stage, OnPolicy),
        ema=stage.ema,
        cuda_graphs=cuda_graphs,
    )
    for callback in (c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"):
        trainer.remove_callback(callback)
    return trainer


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks items; the first label of a row is never predicted, so it is not counted either."""
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    batch["labels"][..., 0] = IGNORE
    return batch


_PAD_TO = 64


def collate_shortened(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """:func:`collate`, and rows that say their ``lengths`` end with the longest, rounded up to 64 tokens."""
    batch = collate(items)
    if "lengths" in batch:
        longest = -(-int(batch["lengths"].max()) // _PAD_TO) * _PAD_TO
        batch |= {name: batch[name][..., :longest] for name in ("input_ids", "labels")}
    return batch


def train_stage(trainer: StageTrainer) -> None:
    """Trains to the end, from the newest whole checkpoint where there is one."""
    directory = Path(trainer.args.output_dir)
    checkpoint = trainer.processes.first_does(lambda: last_complete_checkpoint(directory))
    trainer.processes.all_do(lambda: _require_readable(checkpoint))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.require_finite()
    if trainer.average is not None:
        trainer.average.put()


def _require_readable(checkpoint: Path | None) -> None:
    if checkpoint is not None and not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} cannot be seen from every machine: put the run on a disk that all share")
