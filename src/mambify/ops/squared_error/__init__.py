"""How far one tensor is from another, and how large the other is."""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import HAS_TRITON, backends_on, check_shape, pick_backend
from mambify.ops.squared_error import reference

if HAS_TRITON:
    from mambify.ops.squared_error import triton as kernels

__all__ = ["squared_error"]


def squared_error(student: Tensor, teacher: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Σ (student − teacher)² and Σ teacher² over all entries, in float32 whatever the dtypes.

    Only the first is differentiable, and only with respect to ``student``.

    Args:
        backend: "auto", "reference" or "triton".

    Raises:
        InvalidOptionError: unknown backend.
        ValueError: shapes that differ.
    """
    check_shape("squared_error", "teacher", teacher, tuple(student.shape))
    supported = torch.float64 not in (student.dtype, teacher.dtype)
    chosen = pick_backend("squared_error", backend, backends_on(student.device, supported=supported))
    run = reference.squared_error if chosen == "reference" else kernels.squared_error
    return run(student, teacher.detach())
