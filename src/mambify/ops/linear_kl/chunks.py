"""The walk through the positions in chunks: products with the heads, the loss of their logits, and its gradient.

Letters: M positions, C positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambify.ops.head_chunks import logits_buffer, product
from mambify.ops.linear_kl.reference import Objective


class LinearKL(NamedTuple):
    """Sums over positions, and what they were summed from; float32 (float64 for float64 inputs) scalars.

    Attributes:
        total: kl_weight · KL + reverse_kl_weight · reverse KL + ce_weight · cross-entropy + tv_weight · total
            variation, differentiable.
        kl: Σ τ² · KL(teacher ‖ student) in nats.
        reverse_kl: Σ τ² · KL(student ‖ teacher) in nats; zero where it was not asked for.
        ce: Σ −log p_student(label); zero where no cross-entropy was asked for.
        tv: Σ of the total variation, 1 − Σ_v min(student, teacher); zero where it was not asked for.
        agreement: positions at which both models have the same most likely token, the first where several are.
        num_positions: positions that were counted.
    """

    total: Tensor
    kl: Tensor
    reverse_kl: Tensor
    ce: Tensor
    tv: Tensor
    agreement: Tensor
    num_positions: Tensor


@dataclass(frozen=True)
class Plan:
    """How the sums are to be made.

    Attributes:
        loss_of_logits: the backend's; see :func:`mambify.ops.linear_kl.reference.loss_of_logits`.
        compute: dtype of the operands of every matrix product, and of the gradient of the logits.
        difference: the student's logits are made, and rounded to ``student_logits``, as a difference from the
            teacher's; both heads are one tensor then.
    """

    objective: Objective
    loss_of_logits: Callable[..., tuple[Tensor, Tensor | None]]
    compute: torch.dtype
    teacher_logits: torch.dtype
    student_logits: torch.dtype
    difference: bool
    chunk_size: int

    @property
    def exact(self) -> torch.dtype:
        """What sums over positions are kept in."""
        return torch.float64 if self.compute == torch.float64 else torch.float32


def sums_over_positions(
    plan: Plan,
    student_MD: Tensor,
    student_head_VD: Tensor,
    teacher_MD: Tensor,
    teacher_head_VD: Tensor,
    labels_M: Tensor,
) -> LinearKL:
    """The sums; ``total`` has a gradient where the student's hidden states or its head want one."""
    inputs = (student_MD, student_head_VD, teacher_MD, teacher_head_VD, labels_M)
    if torch.is_grad_enabled() and (student_MD.requires_grad or student_head_VD.requires_grad):
        return LinearKL(*_LinearKL.apply(plan, *inputs))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return _walk(plan, *inputs, grad_hidden_MD=None, grad_head_VD=None)


class _LinearKL(torch.autograd.Function):
    """The gradients are made while going forward; going backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        student_MD: Tensor,
        student_head_VD: Tensor,
        teacher_MD: Tensor,
        teacher_head_VD: Tensor,
        labels_M: Tensor,
    ) -> tuple[Tensor, ...]:
        _, hidden_wanted, head_wanted, *_ = ctx.needs_input_grad
        grad_hidden_MD = student_MD.new_empty(student_MD.shape, dtype=plan.compute) if hidden_wanted else None
        grad_head_VD = student_head_VD.new_zeros(student_head_VD.shape, dtype=plan.exact) if head_wanted else None
        sums = _walk(
            plan, student_MD, student_head_VD, teacher_MD, teacher_head_VD, labels_M, grad_hidden_MD, grad_head_VD
        )
        ctx.save_for_backward(grad_hidden_MD, grad_head_VD)
        ctx.dtypes = student_MD.dtype, student_head_VD.dtype
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The factor stays in float32: a scalar tensor would be rounded to the gradient's dtype before multiplying.
        grads = [
            None if grad is None else (grad.to(grad_total.dtype) * grad_total).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *grads, None, None, None


def _walk(
    plan: Plan,
    student_MD: Tensor,
    student_head_VD: Tensor,
    teacher_MD: Tensor,
    teacher_head_VD: Tensor,
    labels_M: Tensor,
    grad_hidden_MD: Tensor | None,
    grad_head_VD: Tensor | None,
) -> LinearKL:
    """The sums; fills ``grad_hidden_MD`` and adds to ``grad_head_VD`` where they are given."""
    device = student_MD.device
    positions, vocabulary = len(labels_M), student_head_VD.shape[0]
    gradient = plan.compute if grad_hidden_MD is not None or grad_head_VD is not None else None
    student_head_VD = student_head_VD.to(plan.compute)
    teacher_head_VD = student_head_VD if plan.difference else teacher_head_VD.to(plan.compute)
    size = min(plan.chunk_size, positions)
    student_logits_CV = logits_buffer(size, vocabulary, plan.student_logits, device)
    teacher_logits_CV = logits_buffer(size, vocabulary, plan.teacher_logits, device)
    sums = torch.zeros(plan.objective.num_rows, device=device, dtype=plan.exact)
    for start in range(0, positions, plan.chunk_size):
        part = slice(start, start + plan.chunk_size)
        labels_C = labels_M[part]
        student_CD = (student_MD[part] - teacher_MD[part] if plan.difference else student_MD[part]).to(plan.compute)
        student_CV = product(student_CD, student_head_VD.T, student_logits_CV[: len(labels_C)])
        teacher_CV = product(teacher_MD[part].to(plan.compute), teacher_head_VD.T, teacher_logits_CV[: len(labels_C)])
        rows_C, grad_CV = plan.loss_of_logits(
            student_CV, teacher_CV, labels_C, plan.objective, difference=plan.difference, gradient=gradient
        )
        sums += rows_C.sum(dim=1)
        if grad_CV is not None and grad_hidden_MD is not None:
            product(grad_CV, student_head_VD, grad_hidden_MD[part])
        if grad_CV is not None and grad_head_VD is not None:
            hidden_CD = student_MD[part].to(plan.compute)
            grad_head_VD += product(grad_CV.T, hidden_CD, torch.empty_like(grad_head_VD))
    objective = plan.objective
    kl, ce, agreement, *others = sums.unbind()
    total = objective.kl_weight * kl + objective.ce_weight * ce
    reverse_kl = tv = torch.zeros_like(kl)
    if objective.reverse_kl_weight:
        reverse_kl = others[0]
        total = total + objective.reverse_kl_weight * reverse_kl
    if objective.tv_weight:
        tv = others[-1]
        total = total + objective.tv_weight * tv
    count = (labels_M != objective.ignore_index).sum().to(plan.exact)
    return LinearKL(total, kl, reverse_kl, ce, tv, agreement, count)
