"""Taking down the logits of tokens that occurred before (Keskar et al., arXiv 1909.05858, section 4.1).

Letters: S rows, X positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambify.ops.backends import check_shape


def penalise(
    logits_SXV: Tensor, seen_SV: Tensor, following_SF: Tensor | None = None, *, penalty: float | Tensor
) -> Tensor:
    """Float32 logits ``[S, X, V]``: divided by the penalty where positive, multiplied where negative, if the token
    occurred before.

    Args:
        seen_SV: whether a token occurred, up to the first position.
        following_SF: F = X - 1 tokens, each of which occurred from the position after it on: drafted tokens, whose
            successors are looked at together with them. ``None`` for one position.
        penalty: one number, or one a row ``[S]``.

    Raises:
        ValueError: shapes that do not belong together.
    """
    S, X, V = logits_SXV.shape
    check_shape("penalise", "seen_SV", seen_SV, (S, V))
    if following_SF is None:
        following_SF = seen_SV.new_zeros(S, 0, dtype=torch.long)
    check_shape("penalise", "following_SF", following_SF, (S, X - 1))
    seen_SXV = seen_SV[:, None].repeat(1, X, 1) if X > 1 else seen_SV[:, None]
    for x in range(1, X):
        token_SX1 = following_SF[:, x - 1, None, None].expand(S, X - x, 1)
        seen_SXV[:, x:].scatter_(2, token_SX1, True)
    if isinstance(penalty, Tensor):
        check_shape("penalise", "penalty", penalty, (S,))
        penalty = penalty.float()[:, None, None]
    exact_SXV = logits_SXV.float()
    taken_down_SXV = torch.where(exact_SXV < 0, exact_SXV * penalty, exact_SXV / penalty)
    return torch.where(seen_SXV, taken_down_SXV, exact_SXV)
