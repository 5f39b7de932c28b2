"""What a stage writes and reads: the trained parameters, whole, whatever they are spread over.

A file has the same names and values for any number of processes, and whether or not weights are sharded. A checkpoint's
folder counts only once a marker says that it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mambify.distill.parallel import Processes, part, spread_like, whole
from mambify.errors import CheckpointError, OutputWriteError
from mambify.io import atomic_file

#: the marker
COMPLETE = "complete"
_ALONE = Processes()


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter of everything in ``module`` that trains."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def save_trained(module: nn.Module, path: Path, processes: Processes = _ALONE) -> None:
    """Writes the trained parameters, whole, as one safetensors file; all processes must call it, the first writes."""
    save_named(trained_parameters(module), path, processes)


def save_named(named: Mapping[str, Tensor], path: Path, processes: Processes) -> None:
    """Writes tensors by name, as :func:`save_trained` does."""
    tensors = {}
    for name, tensor in named.items():
        gathered = whole(tensor.detach(), processes.device)
        if processes.first:
            tensors[name] = gathered.cpu().contiguous()
    processes.first_does(lambda: write_tensors(tensors, path))


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        OutputWriteError: the disk refused.
    """
    with atomic_file(path, overwrite=True) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OutputWriteError(f"cannot write {path}: {error}") from error


def load_trained(module: nn.Module, path: Path) -> None:
    """Puts the parameters of :func:`save_trained` back, on every process that calls it.

    Raises:
        CheckpointError: unreadable, or not of the parameters that train.
    """
    load_named(trained_parameters(module), path)


def load_named(named: Mapping[str, Tensor], path: Path) -> None:
    """Reads tensors by name into ``named``; raises as :func:`load_trained` does."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing, truncated or malformed: {error}") from error
    if tensors.keys() != named.keys():
        odd = sorted(tensors.keys() ^ named.keys())[0]
        raise CheckpointError(f"{path} does not hold what this stage trains: '{odd}' is on one side only")
    with torch.no_grad():
        for name, tensor in tensors.items():
            part(named[name]).copy_(part(spread_like(tensor, named[name])))


def copy_trained(source: nn.Module, target: nn.Module, device: str) -> None:
    """Gives ``target`` what ``source``, which may be sharded, has trained; all processes must call it."""
    ours = trained_parameters(target)
    with torch.no_grad():
        for name, parameter in trained_parameters(source).items():
            ours[name].copy_(whole(parameter.detach(), device))


def last_complete_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint below ``directory``; those a crash left half-written are removed."""
    found = []
    for path in directory.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            found.append(path)
        else:
            shutil.rmtree(path)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
