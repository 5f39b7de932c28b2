"""Which positions a loss counts.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100


def next_token_labels(labels_BT: Tensor) -> Tensor:
    """``[B, T]`` labels aligned with the inputs → ``[B·T]`` label of the *next* token; the last of a row is ignored."""
    shifted = torch.full_like(labels_BT, IGNORE)
    shifted[:, :-1] = labels_BT[:, 1:]
    return shifted.flatten()
