"""The squared error in pure torch."""

from __future__ import annotations

from torch import Tensor

from mambify.ops.backends import accumulation_dtype


def squared_error(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.squared_error.squared_error`."""
    exact = accumulation_dtype(student, teacher)
    student, teacher = student.to(exact), teacher.to(exact)
    return (student - teacher).square().sum(), teacher.square().sum()
