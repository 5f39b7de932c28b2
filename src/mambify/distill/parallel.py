"""Several processes, one run: what they agree on, what only the first one does, and how their gradients add up.

Started by ``torchrun`` or ``accelerate launch``, every process runs the same program on its own device. Two ways to
divide the work:

- *replicated* (the default): each process has whole copies of teacher and student and works on its share of a step.
- *sharded* (accelerate's FSDP, version 2): each weight is spread over the processes and gathered for as long as its
  layer runs: :mod:`mambify.distill.sharding`.

Why gradients are added up here and not by ``DistributedDataParallel``: that wrapper wants one forward and one backward
pass a step, over all parameters. Alignment takes one of each a layer, and a step that was recorded as a CUDA graph runs
none of its hooks. One sum over the processes, in a few large pieces after the last micro-batch, serves both; the price
is that it does not overlap with the backward pass. And sums need no care about averages: losses are sums over tokens
too, and the gradients are divided once, by what the whole step counted (``DistillationStage.finish_gradients``). So a
step is the same step on any number of processes, but for the order in which floating-point numbers are added.

Files are written by the first process alone. Where its disk fails, the others are told, and all raise the same error: a
process that waits for one that has gone would wait for ever.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import FullyShardedDataParallelPlugin  # type: ignore[import-untyped]
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mambify.errors import InvalidOptionError, MambifyError, UnsupportedError

T = TypeVar("T")

_USE_FSDP, _USE_DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
_BUCKET_ELEMENTS = 2**25


@dataclass(frozen=True)
class Sharding:
    """How weights are spread, as accelerate's configuration says.

    Attributes:
        reshard_after_forward: give up gathered weights after a layer's forward pass and gather them again for the
            backward pass.
        offload: keep the shards, their gradients and the optimizer in host memory.
    """

    reshard_after_forward: bool = True
    offload: bool = False


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them; a run in one process has only itself.

    Attributes:
        rank, count: which one this is, of how many.
        device: where this one computes.
        sharding: ``None`` where weights are replicated.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    sharding: Sharding | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def home(self) -> str:
        """Where whole models live: on the device, or in host memory where only shards of them fit there."""
        return self.device if self.sharding is None else "cpu"

    def describe(self) -> str:
        """``2 processes, weights sharded``."""
        if self.count == 1:
            return "1 process"
        return f"{self.count} processes, weights {'replicated' if self.sharding is None else 'sharded'}"

    def first_does(self, work: Callable[[], T]) -> T:
        """The first process does ``work``; all return what it gave, or raise what it raised."""
        if self.count == 1:
            return work()
        outcome: list[object] = [None, None]
        error: Exception | None = None
        if self.first:
            try:
                outcome[0] = work()
            except Exception as caught:
                error, outcome[1] = caught, _portable(caught)
        dist.broadcast_object_list(outcome, src=0)
        if error is not None:
            raise error
        if isinstance(outcome[1], Exception):
            raise outcome[1]
        return outcome[0]  # type: ignore[return-value]

    def all_do(self, work: Callable[[], T]) -> T:
        """Every process does ``work``; where one fails, all raise."""
        if self.count == 1:
            return work()
        result: list[T] = []
        error: Exception | None = None
        try:
            result.append(work())
        except Exception as caught:
            error = caught
        self.agree(error)
        return result[0]

    def agree(self, error: Exception | None) -> None:
        """Raises ``error``, or on the processes that have none the first that another one has."""
        if self.count > 1:
            errors: list[Exception | None] = [None] * self.count
            dist.all_gather_object(errors, None if error is None else _portable(error))
            error = error or next((e for e in errors if e is not None), None)
        if error is not None:
            raise error

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all processes, on every one of them."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: float) -> list[float]:
        """What every process has for ``value``, in their order."""
        if self.count == 1:
            return [value]
        values = torch.zeros(self.count, dtype=torch.float64, device=self.device)
        values[self.rank] = value
        found: list[float] = self.total(values).tolist()
        return found

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the first one's ``tensors``, in place."""
        if self.count == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().to(self.device)
            dist.broadcast(sent, src=0)
            tensor.detach().copy_(sent)

    def add_up_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces each gradient by its sum over the processes; does nothing where weights are sharded.

        (There the backward pass has summed them already, each process holding the part that belongs to its shard.)
        """
        if self.count == 1 or self.sharding is not None:
            return
        under_way: deque[_Bucket] = deque()
        for gradients in _buckets([p.grad for p in parameters if p.grad is not None]):
            under_way.append(_Bucket(gradients))
            if len(under_way) > 1:  # one is sent while the next is packed; more would only hold memory
                under_way.popleft().arrive()
        for bucket in under_way:
            bucket.arrive()


def process_count() -> int:
    """How many processes this one was started among, from what the launcher left in the environment."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def process_rank() -> int:
    """Which of them this one is; the first writes and speaks."""
    return int(os.environ.get("RANK", "0"))


def leave() -> None:
    """Ends the group that :func:`joined` made, where there is one; for a program that ends now."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Joins the processes of this run (none, where it was started as one) and says how the work is divided.

    While the context is open, accelerate is not told of sharding: it would wrap the model and match its parameters to
    the optimizer's by address, which parameters smaller than the number of processes do not have.

    Args:
        device: ``cpu`` or ``cuda``: with several processes each takes the GPU of its own number.

    Raises:
        InvalidOptionError: a particular GPU for all, or more processes on this machine than it has GPUs.
        UnsupportedError: a kind of sharding that is not offered.
    """
    count = process_count()
    if count == 1:
        yield Processes(device=device)
        return
    check_device(device)
    sharding = sharding_asked_for()
    state = PartialState(cpu=device == "cpu")
    own = str(state.device) if state.device.type == "cuda" else device
    hidden = os.environ.pop(_USE_FSDP, None)
    try:
        yield Processes(state.process_index, state.num_processes, own, sharding)
    finally:
        if hidden is not None:
            os.environ[_USE_FSDP] = hidden


def check_device(device: str) -> None:
    """Refuses what several processes cannot do on ``device``, before any of them waits for another.

    Raises:
        InvalidOptionError: see :func:`joined`.
    """
    if process_count() == 1:
        return
    if ":" in device:
        raise InvalidOptionError(f"several processes cannot share {device}: leave the device out, each takes its own")
    here = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and here >= torch.cuda.device_count():
        raise InvalidOptionError(
            f"process {here} of this machine has no GPU of its own: start at most {torch.cuda.device_count()} here"
        )


def sharding_asked_for() -> Sharding | None:
    """What ``accelerate launch`` was told about FSDP; ``None`` where weights are to be replicated.

    Raises:
        UnsupportedError: FSDP version 1, or activation checkpointing asked for there.
    """
    if os.environ.get(_USE_FSDP, "false").lower() != "true":
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UnsupportedError(f"FSDP version {version} is not supported: set fsdp_version: 2 in accelerate's config")
    plugin = FullyShardedDataParallelPlugin()
    if plugin.activation_checkpointing:
        raise UnsupportedError(
            "activation checkpointing belongs to the recipe: set gradient_checkpointing of the stage, not of FSDP"
        )
    return Sharding(bool(plugin.reshard_after_forward), os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true")


def uses_deepspeed() -> bool:
    """Whether ``accelerate launch`` was told to train with DeepSpeed."""
    return os.environ.get(_USE_DEEPSPEED, "false").lower() == "true"


# ---- tensors that are spread over processes ------------------------------------------------------------------------


def whole(tensor: Tensor, device: str) -> Tensor:
    """``tensor`` in one piece, on every process; all of them must ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor
    near = tensor.detach().to(device)  # shards in host memory travel by way of the device
    assert isinstance(near, DTensor)
    gathered: Tensor = near.full_tensor()
    return gathered


def part(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``; changing it changes ``tensor``."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(value: Tensor, model: Tensor) -> Tensor:
    """The whole ``value``, which every process has, spread over them as ``model`` is; nothing is sent."""
    if not isinstance(model, DTensor):
        return value
    mesh = model.device_mesh
    spread = distribute_tensor(value.to(mesh.device_type), mesh, model.placements, src_data_rank=None)
    return spread.to(part(model).device)


# ---- details -------------------------------------------------------------------------------------------------------


class _Bucket:
    """Gradients on their way to being summed in one message; a large one alone is summed in place."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self.gradients = gradients
        alone = len(gradients) == 1 and gradients[0].is_contiguous()
        self.flat = gradients[0] if alone else torch.cat([g.reshape(-1) for g in gradients])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def arrive(self) -> None:
        """Waits for the sums and puts them into the gradients."""
        assert self.work is not None
        self.work.wait()
        if self.flat is not self.gradients[0]:
            parts = self.flat.split([g.numel() for g in self.gradients])
            torch._foreach_copy_(
                self.gradients, [part.view_as(g) for part, g in zip(parts, self.gradients, strict=True)]
            )


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in order, of one dtype each and some 128 MB together: few messages, and little memory for copies."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.numel() > _BUCKET_ELEMENTS or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket


def _portable(error: Exception) -> Exception:
    """``error``, or what it says where it cannot be sent to another process."""
    try:
        return error if type(pickle.loads(pickle.dumps(error))) is type(error) else MambifyError(str(error))
    except Exception:
        return MambifyError(f"{type(error).__name__}: {error}")
