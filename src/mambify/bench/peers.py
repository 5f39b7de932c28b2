"""Other people's code for the same operations, where it is installed.

None of it is a dependency: ``pip install fla-core`` brings flash-linear-attention's kernels, ``mamba-ssm`` those of
the Mamba authors (its CUDA extension is compiled on the spot), ``liger-kernel`` Liger's. What cannot be imported is
named with the reason beside the figures.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


class PeerMissingError(Exception):
    """A peer that cannot be imported here; the message says why."""


def peer(module: str, name: str) -> Callable[..., Any]:
    """``name`` of ``module``.

    Raises:
        PeerMissingError: it cannot be imported.
    """
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:  # Triton without a driver raises RuntimeError
        raise PeerMissingError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    return found
