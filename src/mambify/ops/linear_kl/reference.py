"""What a chunk of logits contributes to the loss, in pure torch. Letters: C positions of a chunk, V vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mambify.ops.backends import accumulation_dtype


class Objective(NamedTuple):
    """What is summed over positions.

    kl_weight · τ² · KL(teacher ‖ student), reverse_kl_weight · τ² · KL(student ‖ teacher) and tv_weight · their total
    variation at temperature τ, and ce_weight · cross-entropy at 1.
    """

    kl_weight: float
    reverse_kl_weight: float
    ce_weight: float
    tv_weight: float
    temperature: float
    ignore_index: int

    @property
    def num_rows(self) -> int:
        """Rows of sums of a chunk; see :func:`loss_of_logits`."""
        return 3 + (self.reverse_kl_weight != 0) + (self.tv_weight != 0)


def loss_of_logits(
    student_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    objective: Objective,
    *,
    difference: bool,
    gradient: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Losses of a chunk of positions, and their gradient.

    Per position, with p and q the softmax of the student's and the teacher's logits s and t, and p_τ, q_τ those at
    temperature τ:

        τ² · KL(q_τ ‖ p_τ),   −log p(label),   argmax s = argmax t,   τ² · KL(p_τ ‖ q_τ),   ½ Σ |p_τ − q_τ|
        ∂/∂s = kl_weight · τ · (p_τ − q_τ) + ce_weight · (p − onehot(label))
               + reverse_kl_weight · τ · p_τ · (log p_τ − log q_τ − KL(p_τ ‖ q_τ))
               + tv_weight / τ · p_τ · (S − [p_τ < q_τ])   with S = Σ p_τ [p_τ < q_τ]

    The last one: ½ Σ |p − q| = 1 − Σ min(p, q), and min(p_i, q_i) changes with p_i where p_i < q_i alone. With
    ∂p_i/∂s_j = p_i · ([i = j] − p_j) / τ, the derivative of Σ min is p_j · ([p_j < q_j] − S) / τ. A tie has none, and
    counts as not below.

    Args:
        student_CV: s, or s − t where ``difference``. Not to be used afterwards: it may be overwritten.
        teacher_CV: t.
        labels_C: positions that are to be ignored count nothing and have a gradient of zero.
        gradient: dtype of the gradient; None where none is wanted.

    Returns:
        ``[num_rows, C]``, unweighted: KL, cross-entropy (0 where ce_weight is), agreement; then the reverse KL where
        reverse_kl_weight is not 0, then the total variation where tv_weight is not 0. And the gradient or None.
    """
    kl_weight, reverse_kl_weight, ce_weight, tv_weight, temperature, ignore_index = objective
    exact = accumulation_dtype(student_CV)
    kept_C1 = (labels_C != ignore_index).to(exact)[:, None]
    teacher_CV, student_CV = teacher_CV.to(exact), student_CV.to(exact)
    if difference:
        student_CV = student_CV + teacher_CV
    rows_C = torch.zeros(objective.num_rows, len(labels_C), device=labels_C.device, dtype=exact)
    rows_C[2] = (student_CV.argmax(-1) == teacher_CV.argmax(-1)).to(exact)

    logp_CV = _log_softmax(student_CV, temperature)
    logq_CV = _log_softmax(teacher_CV, temperature)
    q_CV = logq_CV.exp()
    if tv_weight:
        p_CV = logp_CV.exp()
        rows_C[-1] = (p_CV - q_CV).abs_().sum(-1) / 2
        below_CV = (p_CV < q_CV).to(exact)
        push_CV = (p_CV * below_CV).sum(-1, keepdim=True).sub(below_CV).mul_(p_CV)
        del below_CV
    ratio_CV = logq_CV.sub_(logp_CV)
    if reverse_kl_weight:
        p_CV = logp_CV.exp()
        mean_C1 = (p_CV * ratio_CV).sum(-1, keepdim=True)  # −KL(p ‖ q)
        rows_C[3] = -mean_C1[:, 0] * temperature**2
        pull_CV = (mean_C1 - ratio_CV).mul_(p_CV)
    rows_C[0] = ratio_CV.mul_(q_CV).sum(-1) * temperature**2
    del logq_CV, ratio_CV, teacher_CV
    logp1_CV, target_C1 = logp_CV, labels_C.masked_fill(labels_C == ignore_index, 0)[:, None]
    if ce_weight:
        if temperature != 1:
            logp1_CV = _log_softmax(student_CV, 1.0)
        rows_C[1] = -logp1_CV.gather(1, target_C1)[:, 0]
    rows_C *= kept_C1.T
    if gradient is None:
        return rows_C, None

    p_CV = logp_CV.exp_()
    grad_CV = q_CV.sub_(p_CV).mul_(kept_C1 * (-kl_weight * temperature))
    if reverse_kl_weight:
        grad_CV.addcmul_(pull_CV, kept_C1, value=reverse_kl_weight * temperature)
    if tv_weight:
        grad_CV.addcmul_(push_CV, kept_C1, value=tv_weight / temperature)
    if ce_weight:
        p1_CV = p_CV if temperature == 1 else logp1_CV.exp_()
        grad_CV.addcmul_(p1_CV, kept_C1, value=ce_weight)
        grad_CV.scatter_add_(1, target_C1, -ce_weight * kept_C1)
    return rows_C, grad_CV.to(gradient)


def _log_softmax(logits_CV: Tensor, temperature: float) -> Tensor:
    return functional.log_softmax(logits_CV if temperature == 1 else logits_CV / temperature, dim=-1)
