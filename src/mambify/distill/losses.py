"""The losses of distillation.

Legend: B rows, T tokens, M positions (B·T flattened), D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.linear_kl import LinearKL, linear_kl

IGNORE = -100


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
) -> LinearKL:
    """Word-level KL (arXiv 2408.15237, section 3) and sequence-level cross-entropy through the output heads.

    Sums over the positions whose label is not ``IGNORE``; see :func:`mambify.ops.linear_kl.linear_kl`.
    """
    return linear_kl(
        student_MD,
        student_head_VD,
        teacher_MD,
        teacher_head_VD,
        labels_M,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        ignore_index=IGNORE,
    )


def next_token_labels(labels_BT: Tensor) -> Tensor:
    """``[B, T]`` labels aligned with the inputs → ``[B·T]`` label of the *next* token; the last of a row is ignored."""
    shifted = torch.full_like(labels_BT, IGNORE)
    shifted[:, :-1] = labels_BT[:, 1:]
    return shifted.flatten()
