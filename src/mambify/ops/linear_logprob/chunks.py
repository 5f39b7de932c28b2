"""The walk through the positions in chunks: the product with the head, the log-probabilities, and their gradient.

A position's hidden state has its gradient from that position alone, so what comes in going backward only scales it:

    ∂ logp_n/∂ hidden_n = head[label_n] − Σ_v p_nv · head_v

can be made going forward, from the logits that are there. It takes the memory of the hidden states and spares the
product that making the logits a second time would be: a third of all.

Letters: N positions, C positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambify.ops.head_chunks import logits_buffer, product


@dataclass(frozen=True)
class Plan:
    """How the log-probabilities are to be made.

    Attributes:
        logp_of_logits: the backend's; see :func:`mambify.ops.linear_logprob.reference.logp_of_logits`.
        compute: dtype of the operands of every matrix product, and of the gradient of the logits.
        exact: of logits and log-probabilities.
    """

    logp_of_logits: Callable[..., tuple[Tensor, Tensor | None]]
    compute: torch.dtype
    exact: torch.dtype
    ignore_index: int
    chunk_size: int


def logp_of_positions(plan: Plan, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """The log-probabilities, with a gradient where the hidden states want one."""
    if torch.is_grad_enabled() and hidden_ND.requires_grad:
        logp_N: Tensor = _LinearLogProb.apply(plan, hidden_ND, head_VD, labels_N)  # type: ignore[no-untyped-call]
        return logp_N
    with torch.no_grad():
        return _walk(plan, hidden_ND, head_VD, labels_N, slope_ND=None)


class _LinearLogProb(torch.autograd.Function):
    """The slopes are made while going forward; going backward only scales them."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
        slope_ND = hidden_ND.new_empty(hidden_ND.shape, dtype=plan.compute)
        logp_N = _walk(plan, hidden_ND, head_VD, labels_N, slope_ND)
        ctx.save_for_backward(slope_ND)
        ctx.dtype = hidden_ND.dtype
        return logp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (slope_ND,) = ctx.saved_tensors
        return None, (slope_ND * grad_N[:, None]).to(ctx.dtype), None, None


def _walk(plan: Plan, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, slope_ND: Tensor | None) -> Tensor:
    """The log-probabilities; fills ``slope_ND``, their gradients, where it is given."""
    positions, vocabulary = len(labels_N), head_VD.shape[0]
    head_VD = head_VD.to(plan.compute)
    logits_CV = logits_buffer(min(plan.chunk_size, positions), vocabulary, plan.exact, hidden_ND.device)
    logp_N = torch.empty(positions, dtype=plan.exact, device=hidden_ND.device)
    for start in range(0, positions, plan.chunk_size):
        part = slice(start, start + plan.chunk_size)
        labels_C = labels_N[part]
        part_CV = product(hidden_ND[part].to(plan.compute), head_VD.T, logits_CV[: len(labels_C)])
        logp_N[part], grad_CV = plan.logp_of_logits(
            part_CV, labels_C, plan.ignore_index, gradient=None if slope_ND is None else plan.compute
        )
        if grad_CV is not None and slope_ND is not None:
            product(grad_CV, head_VD, slope_ND[part])
    return logp_N
