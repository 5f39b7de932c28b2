"""A stage whose weights are spread over the processes (PyTorch's FSDP2, ``fully_shard``).

A stage names its units, inner before outer; each is gathered when it runs and given up again. Frozen and trained
weights never share a unit:

- A layer's frozen weights, teacher's and student's together, are one unit, as they are stored.
- What trains has float32 masters, and its gradients are added up in float32. Matrices, where the arithmetic is in
  bfloat16, are gathered in bfloat16: half the bytes, and what autocast would round them to anyway. All else of a mixer
  (decays, biases, convolution) is gathered in float32, for no policy may round ``A_log``.

The models themselves stay whole, in host memory: :func:`shard` copies the stage around the same storage, and each unit
takes its part to the device. Between stages the models can be converted further, and saved, as with one process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from mambify.distill.parallel import Processes
from mambify.distill.trainer import DistillationStage

S = TypeVar("S", bound=DistillationStage)


def shard(stage: S, processes: Processes, *, bfloat16: bool) -> S:
    """A copy of ``stage`` with its parameters spread over ``processes``; ``stage`` itself stays as it is.

    Args:
        stage: with its weights in host memory, the same on every process.
        bfloat16: whether the run multiplies in it.
    """
    assert processes.sharding is not None
    kind = torch.device(processes.device).type
    mesh = init_device_mesh(kind, (processes.count,))
    offload = CPUOffloadPolicy(pin_memory=kind != "cpu") if processes.sharding.offload else OffloadPolicy()
    twin = _twin(stage)
    for unit in twin.units():
        half = bfloat16 and _only_trained_matrices(unit.module)
        reshard = processes.sharding.reshard_after_forward and not unit.backward_follows
        fully_shard(
            unit.module,
            mesh=mesh,
            reshard_after_forward=None if unit.module is twin else reshard,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            offload_policy=offload,
        )
        sharded = cast(FSDPModule, unit.module)
        sharded.set_gradient_divide_factor(1.0)  # add gradients up: the stage divides by what the step counted
        sharded.set_force_sum_reduction_for_comms(True)
    for module, following in twin.ahead():
        module.register_forward_pre_hook(_fetch(following))
    return twin


def _twin(stage: S) -> S:
    """A copy of the modules around the same numbers: every parameter a new one with the old one's storage."""
    memo: dict[int, object] = {}
    models: tuple[nn.Module, ...] = (stage, *stage.outside)
    for model in models:
        for parameter in model.parameters():
            memo.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad))
    return copy.deepcopy(stage, memo)


def _only_trained_matrices(module: nn.Module) -> bool:
    """Whether everything in ``module`` trains and belongs to a linear layer."""
    linear = {id(p) for m in module.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    return all(p.requires_grad and id(p) in linear for p in module.parameters())


def _fetch(following: Iterable[nn.Module]) -> Callable[..., None]:
    """A hook: before a unit computes, those that run after it begin to be gathered."""
    modules = [cast(FSDPModule, module) for module in following]

    def hook(*_: object) -> None:
        for module in modules:
            module.unshard(async_op=True)

    return hook


@contextmanager
def lent(modules: Iterable[nn.Module], device: str) -> Iterator[None]:
    """While open, each of ``modules`` has its weights on ``device`` for as long as it runs, else in host memory."""
    held: dict[nn.Module, list[Tensor]] = {}

    def take(module: nn.Module, _: object) -> None:
        held[module] = [p.data for p in module.parameters()]
        for parameter in module.parameters():
            parameter.data = parameter.data.to(device)

    def give_back(module: nn.Module, *_: object) -> None:
        for parameter, data in zip(module.parameters(), held.pop(module), strict=True):
            parameter.data = data

    hooks = []
    for module in modules:
        hooks += [
            module.register_forward_pre_hook(take),
            module.register_forward_hook(give_back, always_call=True),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
