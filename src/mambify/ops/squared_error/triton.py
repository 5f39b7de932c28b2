"""The squared error as Triton kernels: both sums from one read, the gradient from another."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK, _STEPS = 2048, 8  # a program sums this many blocks, so that few partial sums are left


def squared_error(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`mambify.ops.squared_error.squared_error`."""
    error, energy = _SquaredError.apply(student.contiguous(), teacher.contiguous())
    return error, energy


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        programs = triton.cdiv(student.numel(), _BLOCK * _STEPS)
        partial = torch.empty(2, programs, dtype=torch.float32, device=student.device)
        _sums[(programs,)](
            student, teacher, partial, student.numel(), programs, BLOCK=_BLOCK, STEPS=_STEPS, num_warps=8
        )
        ctx.save_for_backward(student, teacher)
        error, energy = partial.sum(1).unbind()
        ctx.mark_non_differentiable(energy)
        return error, energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, derror: Tensor, _: Tensor) -> tuple[Tensor, None]:
        student, teacher = ctx.saved_tensors
        dstudent = torch.empty_like(student)
        _gradient[(triton.cdiv(student.numel(), _BLOCK),)](
            student, teacher, derror.float(), dstudent, student.numel(), BLOCK=_BLOCK, num_warps=8
        )
        return dstudent, None


@triton.jit
def _sums(student_ptr, teacher_ptr, partial_ptr, numel, programs, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    program = tl.program_id(0)
    error = tl.zeros([BLOCK], tl.float32)
    energy = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        place = (program.to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        student = tl.load(student_ptr + place, mask=place < numel, other=0.0).to(tl.float32)
        teacher = tl.load(teacher_ptr + place, mask=place < numel, other=0.0).to(tl.float32)
        error += (student - teacher) * (student - teacher)
        energy += teacher * teacher
    tl.store(partial_ptr + program, tl.sum(error, 0))
    tl.store(partial_ptr + programs + program, tl.sum(energy, 0))


@triton.jit
def _gradient(student_ptr, teacher_ptr, factor_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    student = tl.load(student_ptr + place, mask=place < numel, other=0.0).to(tl.float32)
    teacher = tl.load(teacher_ptr + place, mask=place < numel, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, 2.0 * tl.load(factor_ptr) * (student - teacher), mask=place < numel)
