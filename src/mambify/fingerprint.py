"""Hashes of what a run reads: two that are equal were made from the same bytes, wherever these lay."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from torch import nn

_VALUES = 64  # of each parameter


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of 64 values from every parameter: tells models, and one model in two dtypes, apart."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        values = parameter.detach().flatten()
        values = values[:: max(1, values.numel() // _VALUES)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


def arrays_fingerprint(arrays: Iterable[npt.NDArray[np.integer]]) -> str:
    """A hash of all values and of where each array ends."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]
