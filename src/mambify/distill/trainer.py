"""StageTrainer: transformers' Trainer, plus what every stage of distillation needs.

Checkpoints hold only what is trained and count only once whole; a loss that is no number stops the run before it can
overwrite the last good checkpoint. Data order, schedule, mixed precision, accumulation and logging are the Trainer's.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from mambify.distill.graphs import GraphedStep, StepResult
from mambify.distill.losses import IGNORE
from mambify.errors import CheckpointError, OutputWriteError, TrainingDivergedError
from mambify.io import atomic_write_text

_WEIGHTS = "trained.safetensors"
_COMPLETE = "complete"
_TORCH_WRITE_ERRORS = ("write", "iostream", "inline_container")


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of everything in ``module`` that trains."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def save_trained(module: nn.Module, path: Path) -> None:
    """Writes the trained parameters as one safetensors file."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in trained_parameters(module).items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputWriteError(f"cannot write {path}: {error}") from error


def load_trained(module: nn.Module, path: Path) -> None:
    """Puts the parameters of :func:`save_trained` back.

    Raises:
        CheckpointError: unreadable, or not of the parameters that train.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing, truncated or malformed: {error}") from error
    parameters = trained_parameters(module)
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())[0]
        raise CheckpointError(f"{path} does not hold what this stage trains: '{odd}' is on one side only")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def last_complete_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint below ``directory``; those a crash left half-written are removed."""
    whole = []
    for path in directory.glob("checkpoint-*"):
        if (path / _COMPLETE).is_file():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class DistillationStage(nn.Module):
    """What a stage trains: a module that knows how to turn a batch into gradients."""

    def accumulate_gradients(
        self,
        forward: Callable[..., Any],
        batch: dict[str, Tensor],
        backward: Callable[[Tensor], None],
    ) -> StepResult:
        """Adds one micro-batch's gradients to the trained parameters.

        Args:
            forward: this module, or the wrapper (DDP, FSDP) that it must be called through.
            batch: ``input_ids [B, T]``, ``labels``, perhaps ``position_ids``; ``num_items``, the labels of all
                micro-batches of the step, and ``scale``, one over their number.
            backward: the accelerator's backward pass.
        """
        raise NotImplementedError


class StageTrainer(Trainer):  # type: ignore[misc]
    """Trains a :class:`DistillationStage`; its metrics are averaged between two log lines and reported with the loss.

    Args:
        cuda_graphs: record the forward and backward pass once and replay it; one process on a GPU only.
    """

    def __init__(self, *args: Any, cuda_graphs: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that the labels of all micro-batches of a step are counted
        self._cuda_graphs = cuda_graphs
        self._graphed: GraphedStep | None = None
        self._watched: Tensor | None = None
        self._metric_sums: dict[str, Tensor] = {}
        self._metric_steps = 0

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        batch = self._prepare_inputs(inputs)
        device = batch["input_ids"].device
        scale = 1.0 / self.current_gradient_accumulation_steps
        if num_items_in_batch is None:
            num_items_in_batch = (batch["labels"] != IGNORE).sum() / scale
        elif self.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        batch["num_items"] = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=device)
        batch["scale"] = torch.tensor(scale, device=device)
        result = self._run(model, batch)
        self._add_metrics(result.metrics)
        return self.watch(result.loss.detach())

    def _run(self, model: nn.Module, batch: dict[str, Tensor]) -> StepResult:
        stage = self.accelerator.unwrap_model(model)

        def step(batch: dict[str, Tensor]) -> StepResult:
            kind = batch["input_ids"].device.type
            with torch.autocast(kind, torch.bfloat16, enabled=self.args.bf16, cache_enabled=not self._cuda_graphs):
                result: StepResult = stage.accumulate_gradients(model, batch, self.accelerator.backward)
            return result

        if not self._cuda_graphs or "position_ids" in batch:  # finding the documents waits for the device
            return step(batch)
        if self._graphed is None:
            parameters = list(trained_parameters(stage).values())
            accumulates = self.args.gradient_accumulation_steps > 1
            self._graphed = GraphedStep(step, parameters, batch, accumulates=accumulates)
        return self._graphed(batch) if self._graphed.fits(batch) else step(batch)

    def watch(self, loss: Tensor) -> Tensor:
        """Adds ``loss`` to what :meth:`require_finite` looks at, without waiting for the device."""
        self._watched = loss if self._watched is None else self._watched + loss
        return loss

    def require_finite(self) -> None:
        """Stops the run if any loss since the last call was NaN or infinite.

        Raises:
            TrainingDivergedError: it was.
        """
        watched, self._watched = self._watched, None
        if watched is not None and not math.isfinite(float(watched)):
            raise TrainingDivergedError(
                f"the loss became {float(watched)} by step {self.state.global_step}: stopped; the last good checkpoint "
                f"in {self.args.output_dir} is kept. A lower learning rate usually helps"
            )

    def _add_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Counts one micro-step's metrics towards the next log line."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._metric_sums[name] = self._metric_sums[name] + value if name in self._metric_sums else value
        self._metric_steps += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.require_finite()
            steps = max(self._metric_steps, 1)
            logs |= {name: float(total) / steps for name, total in self._metric_sums.items()}
            self._metric_sums, self._metric_steps = {}, 0
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        self.require_finite()
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OutputWriteError, OSError, RuntimeError) as error:  # torch.save tells of a full disk by RuntimeError
            shutil.rmtree(directory, ignore_errors=True)
            raise OutputWriteError(f"cannot write {directory}: {error}; earlier checkpoints are intact") from error
        if self.args.should_save:
            atomic_write_text(directory / _COMPLETE, "")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        save_trained(self.model, directory / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(model or self.model, Path(resume_from_checkpoint) / _WEIGHTS)
