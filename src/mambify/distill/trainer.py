"""StageTrainer: transformers' Trainer, plus what every stage of distillation needs.

Checkpoints hold only what is trained and count only once whole; a loss that is no number stops the run before it can
overwrite the last good checkpoint. Schedule, mixed precision, accumulation, clipping and logging are the Trainer's; the
order of the data and the sum of gradients over processes are ours (:mod:`mambify.distill.batches`,
:mod:`mambify.distill.parallel`). A checkpoint has the same files whatever the number of processes, and whether or not
weights are sharded, so any of them continues it.
"""

from __future__ import annotations

import functools
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from mambify.distill.average import WeightAverage
from mambify.distill.batches import StepBatches
from mambify.distill.checkpoints import COMPLETE, load_named, load_trained, save_named, save_trained, trained_parameters
from mambify.distill.graphs import GraphedStep, StepResult, Sums
from mambify.distill.parallel import Processes, part, spread_like, whole
from mambify.errors import OutputWriteError, TrainingDivergedError
from mambify.io import atomic_write_text, sync

_WEIGHTS, _AVERAGE = "trained.safetensors", "average.safetensors"
_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"


class Unit(NamedTuple):
    """Modules whose weights are gathered together, where weights are sharded.

    Attributes:
        module: all of it but the units inside it.
        backward_follows: its backward pass comes right after its forward pass, so the weights may as well stay.
    """

    module: nn.Module
    backward_follows: bool = False


class DistillationStage(nn.Module):
    """What a stage trains: a module that knows how to turn a batch into gradients.

    A step is a sum: over the tokens of its micro-batches, on whatever processes these are. The stage adds gradients of
    sums up (:meth:`accumulate_gradients`), and when all are in, divides them by what was counted
    (:meth:`finish_gradients`). How a step is cut into micro-batches therefore changes nothing but rounding.
    """

    @property
    def outside(self) -> tuple[nn.Module, ...]:
        """Modules that this one uses without holding them in its tree."""
        return ()

    def accumulate_gradients(
        self, forward: Callable[..., Any], batch: dict[str, Tensor], backward: Callable[[Tensor], None]
    ) -> StepResult:
        """Adds one micro-batch's gradients of the summed loss to the trained parameters.

        Args:
            forward: this module, or its compiled form, that it must be called through.
            batch: ``input_ids [B, T]``, ``labels``, perhaps ``position_ids``; perhaps ``num_items``, to divide the loss
                by where there is no finishing.
            backward: the accelerator's backward pass.
        """
        raise NotImplementedError

    def finish_gradients(self, sums: Sums) -> None:
        """Divides the step's gradients by its counts.

        Args:
            sums: of the whole step: all micro-batches, all processes.
        """
        raise NotImplementedError

    def loss(self, sums: Sums) -> Tensor:
        """The loss of a step whose sums these are."""
        raise NotImplementedError

    def units(self) -> Iterator[Unit]:
        """What is gathered at once where weights are sharded; inner before outer."""
        raise NotImplementedError

    def ahead(self) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        """Units, and those to begin gathering while they run, where FSDP cannot see the order by itself."""
        return iter(())


def scale_gradients(parameters: Iterator[nn.Parameter], factor: Tensor) -> None:
    """Multiplies all gradients by one number, which stays on its device."""
    gradients = [part(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))


class StageTrainer(Trainer):  # type: ignore[misc]
    """Trains a :class:`DistillationStage`; its metrics are those of all tokens between two log lines.

    Args:
        processes: those of the run.
        item_tokens: tokens of an item of the data set, for the figures.
        in_order: whether the data set is to be read as it stands, and not in an order drawn from the seed.
        ema: decay of the average of weights that the stage ends with; 0 for the last step's weights.
        cuda_graphs: record the forward and backward pass once and replay it; on a GPU, with replicated weights.
    """

    def __init__(
        self,
        *args: Any,
        processes: Processes,
        item_tokens: int,
        in_order: bool = False,
        ema: float = 0.0,
        cuda_graphs: bool = False,
        **kwargs: Any,
    ) -> None:
        self.processes, self.item_tokens, self.in_order = processes, item_tokens, in_order
        super().__init__(*args, **kwargs)
        self.add_callback(_LastStepLogged())
        self.average = WeightAverage(trained_parameters(self.model), ema) if ema else None
        if self.average is not None:
            self.add_callback(_Averaging(self.average))
        # Only DeepSpeed needs the step's count beforehand: its engine steps by itself, before we could divide.
        self.model_accepts_loss_kwargs = self.is_deepspeed_enabled
        self._cuda_graphs = cuda_graphs
        self._graphed: GraphedStep | None = None
        self._watched: Tensor | None = None
        self._step_sums: Sums = {}
        self._names: list[str] = []
        self._sums_since_log: Tensor | None = None
        self._logged_at: tuple[float, int] | None = None

    # ---- placement: a stage is where it trains, and wrapped by nothing ---------------------------------------------

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.is_deepspeed_enabled:
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Autocast and torch.compile, as accelerate sets them up, but no DistributedDataParallel."""
        if self.is_deepspeed_enabled:
            wrapped: nn.Module = super()._wrap_model(model, *args, **kwargs)
            return wrapped
        prepared: nn.Module = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return prepared

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's micro-batches of the whole stage, in one pass."""
        arguments = self.args
        micro_batch = arguments.per_device_train_batch_size
        batches = StepBatches(
            len(self.train_dataset),
            share=micro_batch * arguments.gradient_accumulation_steps,
            micro_batch=micro_batch,
            num_steps=arguments.max_steps,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            rank=self.processes.rank,
            count=self.processes.count,
            in_order=self.in_order,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
        )

    # ---- a step ----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; with the last of a step, its gradients are finished and its loss is returned (else zero)."""
        if self._logged_at is None:  # the first step; nothing leaves training mode after it
            model.train()
            self._logged_at = time.perf_counter(), self.state.global_step
        batch = {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in inputs.items()}
        if self.is_deepspeed_enabled:  # its engine takes the mean over processes
            batch["num_items"] = num_items_in_batch / self.processes.count
        _add(self._step_sums, self._run(model, batch).sums)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        self._names, step = list(self._step_sums), torch.stack(list(self._step_sums.values()))
        self._step_sums = {}
        step = self.processes.total(step)
        sums = dict(zip(self._names, step.unbind(), strict=True))
        if not self.is_deepspeed_enabled:
            self.processes.add_up_gradients(self.model.parameters())
            self.model.finish_gradients(sums)
        self._sums_since_log = step if self._sums_since_log is None else self._sums_since_log + step
        return self.watch(self.model.loss(sums).detach())

    def _run(self, model: nn.Module, batch: dict[str, Tensor]) -> StepResult:
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        backward = functools.partial(self.accelerator.backward, **options)

        def step(batch: dict[str, Tensor]) -> StepResult:
            # A cache of rounded weights would outlive the weights themselves where these are gathered for a while.
            cache = not self._cuda_graphs and self.processes.sharding is None
            with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, self.args.bf16, cache):
                result: StepResult = self.model.accumulate_gradients(model, batch, backward)
            return result

        if not self._cuda_graphs or "position_ids" in batch:  # finding the documents waits for the device
            return step(batch)
        if self._graphed is None:
            parameters = list(trained_parameters(self.model).values())
            accumulates = self.args.gradient_accumulation_steps > 1
            self._graphed = GraphedStep(step, parameters, batch, accumulates=accumulates)
        return self._graphed(batch) if self._graphed.fits(batch) else step(batch)

    # ---- figures ---------------------------------------------------------------------------------------------------

    def watch(self, loss: Tensor) -> Tensor:
        """Adds ``loss`` to what :meth:`require_finite` looks at, without waiting for the device."""
        self._watched = loss if self._watched is None else self._watched + loss
        return loss

    def require_finite(self) -> None:
        """Stops the run if any loss since the last call was NaN or infinite: on all processes, for the loss is theirs.

        Raises:
            TrainingDivergedError: it was.
        """
        watched, self._watched = self._watched, None
        if watched is not None and not math.isfinite(float(watched)):
            raise TrainingDivergedError(
                f"the loss became {float(watched)} by step {self.state.global_step}: stopped; the last good checkpoint "
                f"in {self.args.output_dir} is kept. A lower learning rate usually helps"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.require_finite()
            sums, self._sums_since_log = self._sums_since_log, None
            if sums is not None:
                logs |= dict(zip(self._names, (sums[:, 0] / sums[:, 1].clamp(min=1e-12)).tolist(), strict=True))
            logs |= self._speed_and_memory()
        super().log(logs, start_time)

    def _speed_and_memory(self) -> dict[str, float]:
        """Tokens a second of all processes since the last log line, and the most memory each has held so far (GiB)."""
        now, step = time.perf_counter(), self.state.global_step
        since, first = self._logged_at or (now, step)
        self._logged_at = now, step
        sequences = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.processes.count
        tokens = (step - first) * sequences * self.item_tokens
        peaks = self.processes.gather(_peak_memory(self.args.device))
        figures = {f"peak_memory_gib_{rank}": round(peak / 2**30, 3) for rank, peak in enumerate(peaks)}
        return {"tokens_per_second": round(tokens / max(now - since, 1e-9), 1), **figures}

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        self.require_finite()
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        failed: Exception | None = None
        try:
            super()._save_checkpoint(model, trial)
        except (OutputWriteError, OSError, RuntimeError) as error:  # torch.save tells of a full disk by RuntimeError
            failed = OutputWriteError(f"cannot write {directory}: {error}; earlier checkpoints are intact")
            failed.__cause__ = error
        try:
            self.processes.agree(failed)
        except OutputWriteError:
            if self.processes.first:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        if self.processes.first:
            sync(directory)
            atomic_write_text(directory / COMPLETE, "")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        directory = Path(output_dir or self.args.output_dir)
        save_trained(self.model, directory / _WEIGHTS, self.processes)
        if self.average is not None:
            save_named(self.average.average, directory / _AVERAGE, self.processes)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.optimizer.state_dict()
        gathered: dict[int, dict[str, Any]] = {}
        for index, values in state["state"].items():
            for name, value in values.items():
                value = whole(value, self.processes.device) if isinstance(value, Tensor) else value
                if self.processes.first:
                    moved = isinstance(value, Tensor) and self.processes.sharding is not None
                    gathered.setdefault(index, {})[name] = value.cpu() if moved else value

        def write() -> None:
            torch.save(state | {"state": gathered}, Path(output_dir) / _OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

        self.processes.first_does(write)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model, Path(resume_from_checkpoint) / _WEIGHTS)
        if self.average is not None:
            load_named(self.average.average, Path(resume_from_checkpoint) / _AVERAGE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / _OPTIMIZER, map_location="cpu", weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                    values[name] = spread_like(value, parameters[index])
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))


class _LastStepLogged(TrainerCallback):  # type: ignore[misc]
    """What a stage ends with is logged, whatever the rhythm; in every process, for they gather figures."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True


class _Averaging(TrainerCallback):  # type: ignore[misc]
    """Takes every step's weights into the average."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update(state.global_step)


def _add(totals: Sums, sums: Sums) -> None:
    for name, pair in sums.items():
        totals[name] = totals[name] + pair if name in totals else pair


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
