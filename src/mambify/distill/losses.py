"""The losses of distillation. None of them ever holds logits for all positions at once.

Legend: M positions (B·T flattened), D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def normalized_mse(student: Tensor, teacher: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖² over all entries (of unmasked positions), in float32."""
    student, teacher = student.float(), teacher.float()
    if mask_BT is not None:
        weight = mask_BT[..., None].to(torch.float32)
        student, teacher = student * weight, teacher * weight
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=1e-12)


class HeadLoss(NamedTuple):
    """Sums over positions, and what they were summed from.

    Attributes:
        total: kl_weight · KL + ce_weight · cross-entropy, differentiable.
        kl: Σ KL(teacher ‖ student) in nats.
        ce: Σ −log p_student(label); zero where no cross-entropy was asked for.
        agreement: positions at which both models have the same most likely token.
        num_positions: positions that were counted.
    """

    total: Tensor
    kl: Tensor
    ce: Tensor
    agreement: Tensor
    num_positions: Tensor


def head_loss(
    student_MD: Tensor,
    student_head_VD: Tensor,
    teacher_MD: Tensor,
    teacher_head_VD: Tensor,
    labels_M: Tensor,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> HeadLoss:
    """Word-level KL (arXiv 2408.15237, section 3) and sequence-level cross-entropy through the output head.

    Works through the positions in chunks, and makes the gradient of the student's hidden states (and of its head, where
    that is trained) on the way forward: memory is ``chunk_size · V``, not ``M · V``.

    Args:
        student_MD, teacher_MD: hidden states after the final norm.
        student_head_VD, teacher_head_VD: output heads; may be one tensor.
        labels_M: next token of each position; positions labelled −100 do not count.
        chunk_size: positions worked on at once; by default what keeps a chunk's logits near 2²⁸ numbers on a GPU (1 GB
            in float32) and 2²⁴ on a CPU.
        temperature: both distributions are softened by it, and KL is scaled by its square (Hinton et al., 2015).
    """
    if chunk_size is None:
        budget = 2**24 if student_MD.device.type == "cpu" else 2**28
        chunk_size = max(budget // student_head_VD.shape[0], 16)
    total, kl, ce, agreement, count = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        student_MD,
        student_head_VD,
        teacher_MD,
        teacher_head_VD,
        labels_M,
        kl_weight,
        ce_weight,
        temperature,
        chunk_size,
    )
    return HeadLoss(total, kl, ce, agreement, count)


class _HeadLoss(torch.autograd.Function):
    """Gradient per position: w_kl·τ·(p − q) + w_ce·(p₁ − onehot), times the head; computed while going forward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_MD: Tensor,
        student_head_VD: Tensor,
        teacher_MD: Tensor,
        teacher_head_VD: Tensor,
        labels_M: Tensor,
        kl_weight: float,
        ce_weight: float,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, ...]:
        device = student_MD.device
        compute = _compute_dtype(student_MD)
        heads = student_head_VD.to(compute), teacher_head_VD.to(compute)
        grad_hidden = torch.zeros_like(student_MD, dtype=compute)
        train_head = ctx.needs_input_grad[1]
        grad_head = torch.zeros_like(student_head_VD, dtype=torch.float32) if train_head else None
        kept_M = labels_M != IGNORE
        kl = torch.zeros((), device=device, dtype=torch.float32)
        ce = torch.zeros_like(kl)
        agreement = torch.zeros_like(kl)
        for start in range(0, len(labels_M), chunk_size):
            part = slice(start, start + chunk_size)
            hidden = student_MD[part].to(compute)
            kept = kept_M[part].float()[:, None]
            student = (hidden @ heads[0].T).float()
            teacher = (teacher_MD[part].to(compute) @ heads[1].T).float()
            agreement += ((student.argmax(-1) == teacher.argmax(-1)) * kept[:, 0]).sum()
            log_p = F.log_softmax(student / temperature, dim=-1)
            log_q = F.log_softmax(teacher / temperature, dim=-1)
            del teacher
            q = log_q.exp()
            kl += (q * (log_q - log_p)).sum(-1).mul(kept[:, 0]).sum() * temperature**2
            del log_q
            grad = log_p.exp_().sub_(q).mul_(kl_weight * temperature)
            del q
            if ce_weight:
                log_p1 = F.log_softmax(student, dim=-1)
                target = labels_M[part].clamp(min=0)[:, None]
                ce -= (log_p1.gather(1, target) * kept).sum()
                p1 = log_p1.exp_()
                p1.scatter_add_(1, target, -torch.ones_like(target, dtype=p1.dtype))
                grad.add_(p1, alpha=ce_weight)
            grad = grad.mul_(kept).to(compute)
            grad_hidden[part] = grad @ heads[0]
            if grad_head is not None:
                grad_head += (grad.T @ hidden).float()
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtypes = student_MD.dtype, student_head_VD.dtype
        count = kept_M.sum().float()
        total = kl_weight * kl + ce_weight * ce
        ctx.mark_non_differentiable(kl, ce, agreement, count)
        return total, kl, ce, agreement, count

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        hidden_dtype, head_dtype = ctx.dtypes
        return (
            (grad_hidden * grad_total).to(hidden_dtype),
            None if grad_head is None else (grad_head * grad_total).to(head_dtype),
            *[None] * 7,
        )


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the head's matmul: autocast's where it is on, else that of the hidden states."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def next_token_labels(labels_BT: Tensor) -> Tensor:
    """``[B, T]`` labels aligned with the inputs → ``[B·T]`` label of the *next* token; the last of a row is ignored."""
    shifted = torch.full_like(labels_BT, IGNORE)
    shifted[:, :-1] = labels_BT[:, 1:]
    return shifted.flatten()
