"""What every operation shares: the checks of ``backend=`` and of shapes, the dtype of sums, the layout of inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from mambify.errors import InvalidOptionError, did_you_mean

#: Whether kernels may be imported at all; PyTorch's CUDA builds bring Triton, its CPU builds do not.
HAS_TRITON = find_spec("triton") is not None


def backends_on(device: torch.device, *, supported: bool = True) -> tuple[str, ...]:
    """The implementations that can run on ``device``, the one that ``"auto"`` takes first.

    Args:
        supported: whether the operation's Triton kernels take these shapes and dtypes.
    """
    if not (HAS_TRITON and supported):
        return ("reference",)
    if device.type == "cuda":
        return ("triton", "reference")
    # Triton's interpreter: for tests of the kernels on a CPU, orders of magnitude slower than the reference.
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return ("reference", "triton") if interpreted else ("reference",)


def pick_backend(operation: str, backend: str, available: Sequence[str]) -> str:
    """The implementation to run: ``backend`` itself, or for ``"auto"`` the first of ``available``.

    Raises InvalidOptionError where ``backend`` is unknown or cannot run here, naming those that can.
    """
    if backend == "auto":
        return available[0]
    if backend not in available:
        known = ("auto", *available)
        near = did_you_mean(backend, known)
        listed = "" if near.startswith("known: ") else f" (known: {', '.join(known)})"
        raise InvalidOptionError(f"{operation}: no backend '{backend}' here; {near}{listed}")
    return backend


def check_chunk_size(operation: str, chunk_size: int) -> None:
    """Raises InvalidOptionError unless ``chunk_size`` is at least 1."""
    if chunk_size < 1:
        raise InvalidOptionError(f"{operation}: chunk_size must be at least 1, got {chunk_size}")


def check_shape(operation: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError where ``tensor`` is given and not of ``shape``: broadcasting would hide a mistake."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{operation}: {name} must have shape {shape}, got {tuple(tensor.shape)}")


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where an input is float64: what decays, states and sums are kept in."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def last_adjacent(tensor: Tensor) -> Tensor:
    """Itself where the last dimension lies together in memory, as in any view of a projection; a copy otherwise."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def documents(seq_idx_BT: Tensor) -> Tensor:
    """Numbers the documents of each row: 0 at its first token, one more wherever ``seq_idx`` changes."""
    changes_BT = torch.zeros_like(seq_idx_BT, dtype=torch.long)
    changes_BT[:, 1:] = seq_idx_BT[:, 1:] != seq_idx_BT[:, :-1]
    return changes_BT.cumsum(dim=1)
