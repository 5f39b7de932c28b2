"""Log-probabilities of labels from a chunk of logits, in pure torch. Letters: C positions of a chunk, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mambify.ops.backends import accumulation_dtype


def logp_of_logits(
    logits_CV: Tensor, labels_C: Tensor, ignore_index: int, *, gradient: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits)[label] of each position, and its gradient with respect to the logits, onehot − softmax.

    Args:
        logits_CV: not to be used afterwards: it may be overwritten.
        labels_C: positions that are to be ignored have log-probability 0 and a gradient of zero.
        gradient: dtype of the gradient; None where none is wanted.

    Returns:
        ``[C]`` in float32 (float64 for float64 logits), and ``[C, V]`` or None.
    """
    kept_C1 = (labels_C != ignore_index)[:, None]
    target_C1 = labels_C[:, None].masked_fill(~kept_C1, 0)
    logp_CV = functional.log_softmax(logits_CV.to(accumulation_dtype(logits_CV)), dim=-1)
    logp_C = logp_CV.gather(1, target_C1).where(kept_C1, 0.0)[:, 0]
    if gradient is None:
        return logp_C, None
    grad_CV = logp_CV.exp_().neg_()
    grad_CV.scatter_add_(1, target_C1, torch.ones_like(target_C1, dtype=grad_CV.dtype))
    return logp_C, grad_CV.mul_(kept_C1).to(gradient)
